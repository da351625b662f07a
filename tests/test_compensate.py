import copy

import pytest
import torch
from helpers.language import ARCHITECTURES, crudely_quantized, tiny_model, token_batches
from torch import nn

import bc_plugin
from bc_plugin import BiasCompensationConfig, BiasCompensationError
from bc_plugin.models.blocks import find_blocks
from bc_plugin.models.float_blocks import BlockSnapshot

EXACT = {"dtype": "float64", "held_out": 0}


@pytest.mark.parametrize("positions", [0, 1, 3, "all"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_reported_error_is_what_a_compensated_model_has(architecture, positions):
    model, quantized = _double(architecture)
    batches = token_batches()
    config = {"positions": positions, **EXACT}
    compensation = bc_plugin.compensate(quantized, model, batches, config)
    assert set(compensation.kinds.values()) == {"linear", "block"}
    assert all(errors.after < errors.before for errors in compensation.errors.values())
    compensation.attach(quantized)
    first = find_blocks(model).names[0]  # it sees the same input in both models
    outputs = []
    for either in (model, quantized):
        either.get_submodule(first).register_forward_hook(
            lambda m, a, output: outputs.append(output[0] if isinstance(output, tuple) else output)
        )
    with torch.no_grad():
        for batch in batches:
            model(**batch)
            quantized(**batch)
    pairs = zip(outputs[::2], outputs[1::2], strict=True)
    measured = torch.stack([(a - b).square().mean() for a, b in pairs]).mean().item()
    assert measured == pytest.approx(compensation.errors[first].after, rel=1e-9)


def _double(architecture="llama"):
    model = tiny_model(architecture).double()
    return model, crudely_quantized(model)


def test_a_linears_vector_is_the_weight_error_times_the_mean_input():
    model, quantized = _double()
    batches = token_batches()
    seen = []
    module = model.model.layers[1].mlp.down_proj
    handle = module.register_forward_hook(lambda m, a, o: seen.append(a[0].flatten(0, 1)))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    compensation = bc_plugin.compensate(quantized, model, batches, {"positions": 0, **EXACT})
    other = quantized.model.layers[1].mlp.down_proj
    expected = (module.weight - other.weight) @ torch.cat(seen).mean(0)
    vector = compensation.vectors["model.layers.1.mlp.down_proj"][0]
    torch.testing.assert_close(vector, expected.detach(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("sites", [("linear",), ("block",), ("linear", "block")])
def test_the_error_of_a_block_falls_by_exactly_the_squared_mean(sites):
    model, quantized = _double()
    config = {"positions": 0, "sites": sites, **EXACT}
    compensation = bc_plugin.compensate(quantized, model, token_batches(), config)
    for name, vectors in compensation.vectors.items():
        errors = compensation.errors[name]
        drop = vectors[0].square().mean().item()
        assert errors.before - errors.after == pytest.approx(drop, rel=1e-9)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_batch_size_change_nothing(side):
    model, quantized = _double()
    lengths = [16, 11, 16, 9]
    rows = [batch["input_ids"][:, :n] for batch, n in zip(token_batches(4), lengths, strict=True)]
    plain = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]
    padded = {"input_ids": [], "attention_mask": []}
    for row in rows:
        gap = 16 - row.shape[1]
        pad = (gap, 0) if side == "left" else (0, gap)
        padded["input_ids"].append(nn.functional.pad(row, pad))
        padded["attention_mask"].append(nn.functional.pad(torch.ones_like(row), pad))
    padded = {key: torch.cat(value) for key, value in padded.items()}
    if side == "left":  # so that rotary embeddings are those of the unpadded rows
        padded["position_ids"] = (padded["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    one = bc_plugin.compensate(quantized, model, plain, {"batch_tokens": 1, **EXACT})
    two = bc_plugin.compensate(quantized, model, [padded], EXACT)
    three = bc_plugin.compensate(quantized, model, plain[::-1], {"batch_tokens": 999, **EXACT})
    for name, vectors in one.vectors.items():
        torch.testing.assert_close(vectors, two.vectors[name], rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(vectors, three.vectors[name], rtol=1e-8, atol=1e-10)


def test_models_are_left_as_they_were():
    model = tiny_model()
    quantized = crudely_quantized(model).train()
    before = copy.deepcopy(quantized.state_dict())
    bc_plugin.compensate(quantized, model, token_batches())
    assert quantized.training
    assert list(quantized.state_dict()) == list(before)
    for module in (*model.modules(), *quantized.modules()):
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert "forward" not in vars(module)


def test_linears_that_were_not_quantized_are_no_sites():
    model = tiny_model()
    quantized = crudely_quantized(model)
    quantized.model.layers[0].mlp.up_proj.weight.data.copy_(
        model.model.layers[0].mlp.up_proj.weight
    )
    compensation = bc_plugin.compensate(quantized, model, token_batches())
    assert "model.layers.0.mlp.up_proj" not in compensation.vectors
    assert "model.layers.1.mlp.up_proj" in compensation.vectors


def test_keep_only_if_better_drops_what_does_not_help_held_out_tokens():
    model = tiny_model()
    quantized = crudely_quantized(model, step=1e-3)  # shifts too small to estimate from few tokens
    batches = token_batches(2, length=3)
    config = {"held_out": 0.5, "positions": 1}
    kept = bc_plugin.compensate(quantized, model, batches, config)
    chosen = bc_plugin.compensate(
        quantized, model, batches, {**config, "keep_only_if_better": True}
    )
    assert len(chosen.vectors) < len(kept.vectors)
    for errors in chosen.errors.values():
        assert errors.held_out_after <= errors.held_out_before


def test_keep_only_if_better_needs_something_to_hold_out():
    model = tiny_model()
    with pytest.raises(BiasCompensationError, match="at least two calibration sequences"):
        bc_plugin.compensate(
            crudely_quantized(model), model, token_batches(1), {"keep_only_if_better": True}
        )


def test_dropout_of_a_float_model_in_training_mode_does_not_disturb():
    model = tiny_model("opt", dropout=0.5)
    quantized = crudely_quantized(model)
    expected = bc_plugin.compensate(quantized, model, token_batches())
    found = bc_plugin.compensate(quantized, model.train(), token_batches())
    assert model.training
    assert all(torch.equal(found.vectors[name], v) for name, v in expected.vectors.items())


def test_all_positions_have_a_row_each_and_one_for_later_ones():
    model = tiny_model()
    compensation = bc_plugin.compensate(
        crudely_quantized(model), model, token_batches(length=7), {"positions": "all"}
    )
    assert {v.shape[0] for v in compensation.vectors.values()} == {8}


def test_a_snapshot_of_the_blocks_does_as_well_as_the_model():
    model = tiny_model()
    quantized = crudely_quantized(model)
    expected = bc_plugin.compensate(quantized, model, token_batches())
    snapshot = BlockSnapshot(model, find_blocks(model))
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()
    found = bc_plugin.compensate(quantized, snapshot, token_batches())
    for name, vectors in expected.vectors.items():
        assert torch.equal(vectors, found.vectors[name])


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ([], "empty"),
        (["some text"], "item 0 is of type str"),
        (
            [
                {
                    "input_ids": torch.ones(1, 4, dtype=torch.long),
                    "attention_mask": torch.zeros(1, 4),
                }
            ],
            "all padding",
        ),
        (token_batches(1, length=1), "longest calibration sequence has 1 tokens"),
    ],
    ids=["empty", "text", "padding", "short"],
)
def test_useless_calibration_data_is_refused(calibration, message):
    model = tiny_model()
    with pytest.raises(BiasCompensationError, match=message):
        bc_plugin.compensate(crudely_quantized(model), model, calibration)


def test_outputs_that_are_not_finite_are_refused():
    model = tiny_model()
    quantized = crudely_quantized(model)
    quantized.model.layers[1].mlp.down_proj.weight.data.fill_(float("nan"))
    with pytest.raises(BiasCompensationError, match=r"model\.layers\.1"):
        bc_plugin.compensate(quantized, model, token_batches())


def test_models_that_do_not_match_are_refused():
    model = tiny_model()
    with pytest.raises(BiasCompensationError, match="same modules' names"):
        bc_plugin.compensate(tiny_model("phi3"), model, token_batches())
    with pytest.raises(BiasCompensationError, match="number"):
        bc_plugin.compensate(tiny_model(num_hidden_layers=2), model, token_batches())


def test_two_equal_models_are_refused():
    model = tiny_model()
    with pytest.raises(BiasCompensationError, match="nothing to compensate"):
        bc_plugin.compensate(copy.deepcopy(model), model, token_batches())


def test_a_compensated_model_is_not_compensated_again():
    model = tiny_model()
    quantized = crudely_quantized(model)
    bc_plugin.compensate(quantized, model, token_batches()).attach(quantized)
    with pytest.raises(BiasCompensationError, match="detach"):
        bc_plugin.compensate(quantized, model, token_batches(), BiasCompensationConfig())
