"""The pass with ``scales=True``: group scales first, then the vectors."""

import copy
import warnings

import pytest
import torch
from helpers.grouped import grouped
from helpers.language import crudely_quantized, tiny_model, token_batches

import bc_plugin
from bc_plugin import BiasCompensationConfig, BiasCompensationError, Compensation
from bc_plugin.shift.covariance import InputCovariance

EXACT = {"dtype": "float64", "held_out": 0}


def _pair(architecture="llama", **settings):
    model = tiny_model(architecture).double()
    return model, grouped(model, **settings)


def _scales(model):
    return {k: v.clone() for k, v in model.state_dict().items() if k.endswith(".scales")}


@pytest.mark.parametrize("settings", [{}, {"bits": 2, "shuffled": True}, {"group_size": 12}])
@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_no_linear_is_worse_for_it(architecture, settings):
    """On the data they were fitted to: the scales there were are among those to choose from."""
    model, quantized = _pair(architecture, **settings)
    config = {"positions": 0, **EXACT}
    before = bc_plugin.compensate(quantized, model, token_batches(12), config)
    after = bc_plugin.compensate(quantized, model, token_batches(12), {**config, "scales": True})
    linears = [name for name, kind in before.kinds.items() if kind == "linear"]
    ratios = [after.errors[name].after / before.errors[name].after for name in linears]
    assert max(ratios) < 1 and sum(ratios) / len(ratios) < 0.9
    assert after.scales and after.joint and not before.scales


def test_only_scales_change_and_the_vectors_belong_to_them():
    model, quantized = _pair()
    before = copy.deepcopy(quantized.state_dict())
    compensation = bc_plugin.compensate(quantized, model, token_batches(24), {"scales": True})
    changed = {k for k, v in quantized.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == set(_scales(quantized))
    compensation.attach(quantized)
    again = Compensation.from_entry(compensation.entry(), compensation.vectors)
    assert again.scales and again.joint


def test_the_outputs_that_are_compensated_are_those_of_the_new_scales():
    model, quantized = _pair()
    config = {"positions": 0, **EXACT}
    name = "model.layers.1.mlp.down_proj"
    seen = []
    module = model.get_submodule(name)
    handle = module.register_forward_hook(lambda m, a, o: seen.append(a[0].flatten(0, 1)))
    with torch.no_grad():
        for batch in token_batches():
            model(**batch)
    handle.remove()
    compensation = bc_plugin.compensate(
        quantized, model, token_batches(), {**config, "scales": True}
    )
    shift = module.weight - quantized.get_submodule(name).dense().T
    torch.testing.assert_close(compensation.vectors[name][0], shift @ torch.cat(seen).mean(0))


@pytest.mark.parametrize("positions", [0, 1, "all"])
def test_tokens_with_a_vector_of_their_own_and_padding_do_not_count(monkeypatch, positions):
    counts = []
    fitted = InputCovariance.fitted

    def noted(inputs):
        counts.append(tuple(moments.count for moments in inputs.moments))
        return fitted(inputs)

    monkeypatch.setattr(InputCovariance, "fitted", noted)
    model, quantized = _pair()
    batches = token_batches(4, length=16, batch=2)
    for batch in batches:
        batch["attention_mask"][1, :4] = 0
    config = {"positions": positions, "scales": True, "held_out": 0.25}
    bc_plugin.compensate(quantized, model, batches, config)
    each = 16 + 12 - 2 * (positions != 0)
    # In a block query, key and value share one, as do gate and up.
    assert counts == [(3 * each, each)] * 4 * 3


def test_what_held_out_sequences_are_worse_with_is_left_as_it_is(monkeypatch):
    model, quantized = _pair()
    before = _scales(quantized)
    monkeypatch.setattr("bc_plugin.shift.scales.change_of_error", lambda *args: 1.0)
    compensation = bc_plugin.compensate(quantized, model, token_batches(), {"scales": True})
    assert all(torch.equal(before[name], scales) for name, scales in _scales(quantized).items())
    assert not compensation.scales and not compensation.joint


def test_they_rely_on_their_vectors():
    """As weights do that were quantized jointly."""
    model, quantized = _pair()
    compensation = bc_plugin.compensate(quantized, model, token_batches(), {"scales": True})
    compensation.attach(quantized)
    compensation.detach(quantized)
    with pytest.raises(BiasCompensationError, match="keep linear among the sites"):
        bc_plugin.compensate(quantized, model, token_batches(), {"sites": "block"})


def test_no_vector_is_dropped_that_scales_rely_on(monkeypatch):
    monkeypatch.setattr("bc_plugin.shift.scales.change_of_error", lambda *args: -1.0)
    model, quantized = _pair(bits=8)  # shifts too small to estimate from few tokens
    config = {"held_out": 0.5, "keep_only_if_better": True}
    batches = token_batches(2, length=3)
    alone = bc_plugin.compensate(quantized, model, batches, config)
    before = _scales(quantized)
    found = bc_plugin.compensate(quantized, model, batches, {**config, "scales": True})
    changed = {n for n, s in _scales(quantized).items() if not torch.equal(s, before[n])}
    assert {name.removesuffix(".scales") for name in changed} <= set(found.vectors)
    assert not {name.removesuffix(".scales") for name in changed} <= set(alone.vectors)


def test_a_pass_that_fails_leaves_the_scales_there_were(monkeypatch):
    model, quantized = _pair()
    before = copy.deepcopy(quantized.state_dict())
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(BiasCompensationError, match="not finite"):
        bc_plugin.compensate(quantized, model, token_batches(), {"scales": True})
    assert all(torch.equal(before[k], v) for k, v in quantized.state_dict().items())


def test_rotated_weights_keep_their_scales():
    """Their outputs stand for nothing in the float model, so nothing could be fitted to that."""
    model, _ = _pair()
    rotated = copy.deepcopy(model)
    with torch.no_grad():
        for layer in rotated.model.layers:  # the same function: hidden features in another order
            mlp, order = layer.mlp, torch.randperm(48)
            for linear in (mlp.gate_proj, mlp.up_proj):
                linear.weight.copy_(linear.weight[order])
            mlp.down_proj.weight.copy_(mlp.down_proj.weight[:, order])
    quantized = grouped(rotated, bits=4)
    before = _scales(quantized)
    with pytest.warns(UserWarning, match="Only outputs of blocks"):
        found = bc_plugin.compensate(quantized, model, token_batches(12), {"scales": True})
    assert all(torch.equal(before[name], scales) for name, scales in _scales(quantized).items())
    assert not found.scales and set(found.kinds.values()) == {"block"}


def test_saving_vectors_alone_says_that_they_are_not_all(tmp_path):
    model, quantized = _pair()
    alone = bc_plugin.compensate(quantized, model, token_batches())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        alone.save(tmp_path)
    found = bc_plugin.compensate(quantized, model, token_batches(), {"scales": True})
    with pytest.warns(UserWarning, match="save the model, too"):
        found.save(tmp_path)


def test_what_has_no_scales_is_refused_before_anything_is_done():
    model = tiny_model()
    with pytest.raises(BiasCompensationError, match=r"q_proj is a Linear.*GPTQ, AWQ"):
        bc_plugin.compensate(crudely_quantized(model), model, token_batches(), {"scales": True})


@pytest.mark.parametrize("settings", [{"sites": "block"}, {"scales": 1}])
def test_settings_that_cannot_be_honoured(settings):
    with pytest.raises(BiasCompensationError, match="bias_compensation: s"):
        BiasCompensationConfig(**{"scales": True, **settings})
