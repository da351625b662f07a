"""Weights that are TorchAO's tensors, which know few of a tensor's functions."""

import copy

import pytest
import torch
from helpers.language import tiny_model, token_batches

import bc_plugin
from bc_plugin import BiasCompensationError

ao = pytest.importorskip("torchao.quantization")


def quantized(model, config):
    quantized = copy.deepcopy(model)
    # Not the head, as transformers has it.
    ao.quantize_(quantized.model, config())
    return quantized


@pytest.mark.parametrize(
    "kind",
    ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig", "Float8WeightOnlyConfig"],
)
def test_vectors_are_computed_and_bound_to_the_weights(kind):
    model = tiny_model().bfloat16()
    found = quantized(model, getattr(ao, kind))
    compensation = bc_plugin.compensate(found, model, token_batches())
    assert set(compensation.kinds.values()) == {"linear", "block"}
    assert "model.layers.0.self_attn.q_proj" in compensation.vectors
    other = quantized(tiny_model(seed=1).bfloat16(), getattr(ao, kind))
    with pytest.raises(BiasCompensationError, match="digest"):
        compensation.attach(other)
    compensation.attach(quantized(model, getattr(ao, kind)))


def test_the_digest_reads_what_is_stored():
    model = tiny_model().bfloat16()
    one, other = (quantized(model, ao.Int8WeightOnlyConfig) for _ in range(2))
    compensation = bc_plugin.compensate(one, model, token_batches())
    weight = other.model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        weight.qdata.add_(1)
    with pytest.raises(BiasCompensationError, match="digest"):
        compensation.attach(other)
