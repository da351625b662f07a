"""Quantization-aware training: what torchao rounds, and compensation after it."""

import pytest
import torch

pytest.importorskip("torchao", reason="needs torchao")

import qat
from helpers.images import inputs, tiny

import bc_plugin

KEEP = ["vit.embeddings*", "classifier"]


def test_a_trained_model_is_rounded_and_can_be_compensated():
    model = tiny("vit")
    trained = qat.prepared(model, KEEP).train()
    trained(**inputs("vit", 1)[0]).logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in trained.vit.layers.parameters())
    trained.eval()
    linear = trained.vit.layers[0].mlp.fc1
    rounded = linear.weight_fake_quantizer(linear.weight)
    assert all(len(row.unique()) <= 16 for row in rounded)
    assert type(trained.classifier) is torch.nn.Linear
    compensation = bc_plugin.compensate(trained, model, inputs("vit"))
    assert len(compensation.vectors) == 2 * 7
    assert all(errors.after < errors.before for errors in compensation.errors.values())


def test_without_rounding_it_is_the_float_model():
    model = tiny("vit")
    plain = qat.float_again(qat.prepared(model, KEEP))
    with torch.no_grad():
        assert torch.equal(plain(**inputs("vit", 1)[0]).logits, model(**inputs("vit", 1)[0]).logits)
