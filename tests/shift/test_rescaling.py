"""Blocks within which scales were moved, as AWQ does it, before they were quantized."""

import copy
import warnings

import pytest
import torch
from helpers.grouped import grouped
from helpers.language import crudely_quantized, tiny_model, token_batches

import bc_plugin
from bc_plugin.marks import mark
from bc_plugin.models.blocks import find_blocks
from bc_plugin.shift.rescaling import Rescaling
from bc_plugin.toolkits.awq import record

EXACT = {"dtype": "float64", "held_out": 0, "positions": 0}
GROUPS = (
    ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("self_attn.v_proj", ("self_attn.o_proj",)),
    ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    ("mlp.up_proj", ("mlp.down_proj",)),
)
RESCALED_OUTPUTS = {"self_attn.v_proj", "mlp.up_proj"}


@torch.no_grad()
def _rescaled(model):
    """The same function with other weights, and the record of what was moved."""
    model = copy.deepcopy(model)
    records = {}
    generator = torch.Generator().manual_seed(1)
    for name in find_blocks(model).names:
        block = model.get_submodule(name)
        mark(block, records.setdefault(name, Rescaling()))
        moved = []
        for source, linears in GROUPS:
            width = block.get_submodule(linears[0]).in_features
            scales = torch.rand(width, generator=generator).double() + 0.5
            weight = block.get_submodule(source).weight
            weight.div_(scales if weight.dim() == 1 else scales[:, None])
            for linear in linears:
                block.get_submodule(linear).weight.mul_(scales)
            moved.append((source, linears, scales))
        record(block, moved)
    return model, records


@pytest.fixture(scope="module")
def pair():
    model = tiny_model(num_key_value_heads=4).double()
    return model, *_rescaled(model)


def test_the_rescaled_model_is_the_same_function(pair):
    model, rescaled, _ = pair
    batch = token_batches(1)[0]
    with torch.no_grad():
        torch.testing.assert_close(rescaled(**batch).logits, model(**batch).logits)


def test_without_rounding_there_is_no_shift_at_the_sites_that_are_chosen(pair):
    model, rescaled, records = pair
    found = bc_plugin.compensate(rescaled, model, token_batches(), EXACT, rescalings=records)
    assert not any(name.endswith(tuple(RESCALED_OUTPUTS)) for name in found.vectors)
    assert len(found.vectors) == 3 * (7 - len(RESCALED_OUTPUTS) + 1)
    assert max(errors.before for errors in found.errors.values()) < 1e-20


@pytest.mark.parametrize("forgotten", ["inputs", "outputs"])
def test_a_wrong_choice_would_be_seen(pair, forgotten):
    model, rescaled, records = pair
    wrong = copy.deepcopy(records)
    for each in wrong.values():
        if forgotten == "inputs":
            each.inputs["self_attn.q_proj"] = torch.ones_like(each.inputs["self_attn.q_proj"])
        else:
            each.outputs.clear()
    found = bc_plugin.compensate(rescaled, model, token_batches(), EXACT, rescalings=wrong)
    assert max(errors.before for errors in found.errors.values()) > 1e-2


@pytest.mark.parametrize("records", ["none", "empty"])
def test_without_a_record_only_blocks_are_compensated_and_it_says_so(pair, records):
    model, rescaled, _ = pair
    quantized = crudely_quantized(rescaled)
    empty = {name: Rescaling() for name in find_blocks(model).names}
    with pytest.warns(UserWarning, match="Only outputs of blocks"):
        found = bc_plugin.compensate(
            quantized, model, token_batches(), EXACT, rescalings=empty if records == "empty" else {}
        )
    assert set(found.kinds.values()) == {"block"}


def test_half_precision_is_not_taken_for_rescaling():
    model = tiny_model()
    quantized = crudely_quantized(model).bfloat16()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = bc_plugin.compensate(quantized, model, token_batches())
    assert set(found.kinds.values()) == {"linear", "block"}


def test_scales_are_fitted_to_what_the_rescaled_linears_are_given(pair):
    model, rescaled, records = pair
    quantized = grouped(rescaled, bits=3)
    before, after = (
        bc_plugin.compensate(
            quantized, model, token_batches(12), {**EXACT, "scales": scales}, rescalings=records
        )
        for scales in (False, True)
    )
    linears = [name for name, kind in before.kinds.items() if kind == "linear"]
    assert len(linears) == 5 * 3
    ratios = [after.errors[name].after / before.errors[name].after for name in linears]
    assert max(ratios) < 1 and sum(ratios) / len(ratios) < 0.9


def test_they_are_those_of_the_model_just_before_it_was_rounded(pair):
    model, rescaled, records = pair
    with_record, without = grouped(rescaled, bits=3), grouped(rescaled, bits=3)
    config = {**EXACT, "scales": True}
    found = bc_plugin.compensate(with_record, model, token_batches(), config, rescalings=records)
    bc_plugin.compensate(without, rescaled, token_batches(), config)
    for name in (name for name, kind in found.kinds.items() if kind == "linear"):
        ours, expected = (m.get_submodule(name).scales for m in (with_record, without))
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-9)
