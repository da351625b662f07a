"""Perplexity, KL divergence and agreement, by their definitions."""

import math

import pytest
import torch
from helpers.language import crudely_quantized, tiny_model, token_batches
from torch import nn

import bc_plugin
from bc_plugin import BiasCompensationError


def test_perplexity_kl_and_agreement_are_what_they_are_defined_to_be():
    model = tiny_model()
    quantized = crudely_quantized(model)
    batches = token_batches(3)
    found = bc_plugin.evaluate(quantized, batches, model)
    p, q, targets = [], [], []
    with torch.no_grad():
        for batch in batches:
            p.append(quantized(**batch).logits[0, :-1].double().log_softmax(-1))
            q.append(model(**batch).logits[0, :-1].double().log_softmax(-1))
            targets.append(batch["input_ids"][0, 1:])
    p, q, targets = torch.cat(p), torch.cat(q), torch.cat(targets)
    assert found.tokens == len(targets) == 45
    loss = -p.gather(1, targets[:, None]).mean().item()
    assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-5)
    assert found.kl == pytest.approx((q.exp() * (q - p)).sum(1).mean().item(), rel=1e-4)
    assert found.top1 == pytest.approx((p.argmax(1) == q.argmax(1)).double().mean().item())


def test_a_model_does_not_differ_from_itself():
    model = tiny_model()
    found = bc_plugin.evaluate(model, token_batches(2), model)
    assert found.kl == pytest.approx(0, abs=1e-6)
    assert found.top1 == 1


def test_padding_does_not_count():
    model = tiny_model()
    (batch,) = token_batches(1, length=8)
    padded = {key: nn.functional.pad(value, (0, 5)) for key, value in batch.items()}
    assert bc_plugin.evaluate(model, [padded]).perplexity == pytest.approx(
        bc_plugin.evaluate(model, [batch]).perplexity, rel=1e-5
    )


def test_nothing_to_predict_is_refused():
    with pytest.raises(BiasCompensationError, match="no token to predict"):
        bc_plugin.evaluate(tiny_model(), token_batches(1, length=1))
