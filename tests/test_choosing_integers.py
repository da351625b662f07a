"""The pass with ``integers=True``: integers and scales first, then the vectors."""

import copy

import pytest
import torch
from helpers.language import tiny_model, token_batches
from helpers.packed import packed_checkpoint

import bc_plugin
from bc_plugin import BiasCompensationConfig, BiasCompensationError, Compensation
from bc_plugin.calibration.batches import calibration_batches
from bc_plugin.models.blocks import find_blocks
from bc_plugin.models.modules import stored_tensors
from bc_plugin.models.offloaded import lent
from bc_plugin.shift.covariance import InputCovariance
from bc_plugin.vectors.weights import weights_of

pytest.importorskip("accelerate")

from bc_plugin.streaming.load import open_streamed

WIDE = {"intermediate_size": 64, "num_hidden_layers": 2, "num_key_value_heads": 4}
FITTED = {"positions": 0, "held_out": 0, "dtype": "float32"}
LISTS = ["model.layers"]


@pytest.fixture(params=[{"bits": 2}, {"bits": 3}, {"method": "awq"}], ids=str)
def pair(request, tmp_path):
    """A float model, and one rounded to nearest."""
    model = tiny_model(**WIDE)
    packed_checkpoint(tmp_path / "packed", copy.deepcopy(model), **request.param)
    return model, open_streamed(tmp_path / "packed")


def _tensors(model):
    """What is stored of the blocks."""
    found = {}
    for name in find_blocks(model).names:
        with lent(model, name):
            own = stored_tensors(model.get_submodule(name))
            found |= {f"{name}.{key}": tensor.clone() for key, tensor in own}
    return found


def test_no_linear_is_worse_for_it(pair):
    """On the data they were fitted to, and better by far than with other scales alone."""
    model, quantized = pair
    plain, scaled, chosen = (
        bc_plugin.compensate(copied, model, token_batches(12), {**FITTED, **config})
        for copied, config in (
            (quantized, {}),
            (copy.deepcopy(quantized), {"scales": True}),
            (quantized, {"integers": True}),
        )
    )
    linears = [name for name, kind in plain.kinds.items() if kind == "linear"]
    ratios, of_scales = (
        [found.errors[name].after / plain.errors[name].after for name in linears]
        for found in (chosen, scaled)
    )
    assert max(ratios) < 1 and sum(ratios) < 0.8 * sum(of_scales)
    assert chosen.scales and chosen.joint


def test_only_integers_and_scales_change_and_the_vectors_belong_to_them(pair):
    model, quantized = pair
    before, weights = _tensors(quantized), weights_of(quantized, LISTS)
    found = bc_plugin.compensate(quantized, model, token_batches(12), {**FITTED, "integers": True})
    after = _tensors(quantized)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.rpartition(".")[2] for name in changed} == {"qweight", "scales"}
    assert found.digest != weights.digest
    assert found.digest == weights_of(quantized, LISTS, found.vectors).digest
    assert Compensation.from_entry(found.entry(), found.vectors).scales


def test_what_is_measured_is_what_the_linears_then_give(pair):
    """The mean shift of a linear with its new weight, on the float model's inputs."""
    model, quantized = pair
    name = "model.layers.1.mlp.down_proj"
    seen = []
    module = model.get_submodule(name)
    handle = module.register_forward_hook(lambda m, a, o: seen.append(a[0].flatten(0, 1)))
    with torch.no_grad():
        for batch in token_batches(4):
            model(**batch)
    handle.remove()
    found = bc_plugin.compensate(quantized, model, token_batches(4), {**FITTED, "integers": True})
    with lent(quantized, "model.layers.1"), torch.no_grad():
        shift = module(torch.cat(seen)) - quantized.get_submodule(name)(torch.cat(seen))
    torch.testing.assert_close(found.vectors[name][0], shift.mean(0), rtol=1e-3, atol=1e-5)


def test_leading_tokens_hold_the_integers_but_are_not_centred(pair, monkeypatch):
    model, quantized = pair
    seen = []
    with_leading = InputCovariance.with_leading

    def noted(inputs):
        seen.append((inputs.leading.count, with_leading(inputs) - inputs.fitted()))
        return with_leading(inputs)

    monkeypatch.setattr(InputCovariance, "with_leading", noted)
    batches = token_batches(4, length=16, batch=2)
    config = {"positions": 1, "integers": True, "held_out": 0.25}
    bc_plugin.compensate(copy.deepcopy(quantized), model, batches, config)
    assert seen[0][0] == 6  # of 8 sequences two are held out
    seen.clear()
    bc_plugin.compensate(quantized, model, batches, {**config, "held_out": 0})
    first = model.model.embed_tokens(torch.cat([b["input_ids"][:, 0] for b in batches]))
    given = model.model.layers[0].input_layernorm(first).double()
    moment = given.T @ given / (8 * 15)  # as many as share the covariance
    torch.testing.assert_close(seen[0][1], moment, rtol=1e-3, atol=1e-6)


def test_what_held_out_sequences_are_worse_with_is_left_as_it_is(pair, monkeypatch, capsys):
    model, quantized = pair
    before = _tensors(quantized)
    monkeypatch.setattr("bc_plugin.shift.descent.change_of_error", lambda *args: 1.0)
    found = bc_plugin.compensate(quantized, model, token_batches(), {"integers": True})
    assert all(torch.equal(before[name], tensor) for name, tensor in _tensors(quantized).items())
    assert not found.scales and not found.joint
    assert "keep the integers and scales they have" in capsys.readouterr().out


def test_a_pass_that_fails_leaves_what_there_was(pair):
    model, quantized = pair
    before = _tensors(quantized)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(BiasCompensationError, match="not finite"):
        bc_plugin.compensate(quantized, model, token_batches(), {"integers": True})
    assert all(torch.equal(before[name], tensor) for name, tensor in _tensors(quantized).items())


def test_all_tokens_are_used_unless_a_number_is_given():
    assert BiasCompensationConfig().token_limit == 8192
    assert BiasCompensationConfig(integers=True).token_limit is None
    assert BiasCompensationConfig(integers=True, max_tokens=100).token_limit == 100
    items = [{"input_ids": torch.zeros(1, 1024, dtype=torch.int64)}] * 10
    for integers, tokens in ((False, 8192), (True, 10240)):
        config = BiasCompensationConfig(integers=integers, held_out=0)
        fitted, _ = calibration_batches(items, config)
        assert sum(batch["input_ids"].numel() for batch in fitted) == tokens


def test_a_folder_cannot_take_them(tmp_path):
    with pytest.raises(BiasCompensationError, match="compensate --integers"):
        bc_plugin.compensate(tmp_path, tmp_path, token_batches(), {"integers": True})


def test_linears_are_needed():
    with pytest.raises(BiasCompensationError, match="where integers is set"):
        BiasCompensationConfig(integers=True, sites="block")
