"""What the float model predicts, on disk, and what it is compared with."""

import copy

import pytest
import torch
from helpers.language import token_batches
from helpers.refinement import CALIBRATION, SETTINGS, compensated, refine

import bc_plugin
from bc_plugin import BiasCompensationError, FloatLogits, RefinementConfig
from bc_plugin.models.predictions import predicting_rows


def test_the_largest_values_and_the_rest_as_one(tmp_path):
    model, quantized = compensated()
    batch = token_batches(1, batch=2)[0]
    targets = FloatLogits.record(model, [batch], tmp_path, top_k=5)
    with torch.no_grad():
        log_p = model(**batch).logits[:, :-1].flatten(0, 1).log_softmax(-1).double()
        log_q = quantized(**batch).logits[:, :-1].flatten(0, 1).log_softmax(-1).double()
    index = log_p.topk(5).indices

    def grouped(log):
        p = log.exp()
        top = p.gather(-1, index)
        return torch.cat([top, 1 - top.sum(-1, keepdim=True)], -1)

    log_q.requires_grad_()
    p, q = grouped(log_p), grouped(log_q.log_softmax(-1))
    expected = (p * (p / q).log()).sum()
    (by_hand,) = torch.autograd.grad(expected, log_q)
    whole = (log_p.exp() * (log_p - log_q)).sum()
    logits = (log_q.detach().float()[None] + 3.0).requires_grad_()  # of softmax, the same
    divergence = targets.divergence(0, logits, torch.arange(len(log_q)))
    (gradient,) = torch.autograd.grad(2 * divergence, logits)
    torch.testing.assert_close(gradient[0], 2 * by_hand.float(), rtol=1e-3, atol=1e-6)
    found = divergence.item()
    assert found == pytest.approx(expected.item(), rel=1e-4)
    assert found < whole.item()


def test_padding_is_not_counted(tmp_path):
    model, quantized = compensated()
    batch = token_batches(1, batch=2)[0]
    batch["attention_mask"][1, 10:] = 0
    targets = FloatLogits.record(model, [batch], tmp_path, top_k=None)
    with torch.no_grad():
        logits = quantized(**batch).logits
    rows = predicting_rows(batch)
    assert len(rows) == 15 + 9
    expected = bc_plugin.evaluate(quantized, [batch], model).kl
    found = targets.divergence(0, logits, rows).item() / len(rows)
    assert found == pytest.approx(expected, rel=1e-4)


def test_both_models_need_not_be_there_together(tmp_path):
    model, quantized = compensated()
    other = copy.deepcopy(quantized)
    expected = refine(quantized, model)
    config = RefinementConfig(**SETTINGS)
    bc_plugin.record_float_logits(model, CALIBRATION, config, folder=tmp_path)
    found = refine(other, FloatLogits(tmp_path))
    for name, vectors in expected.vectors.items():
        assert torch.equal(found.vectors[name], vectors)
    with pytest.raises(BiasCompensationError, match="batch 0 of 4 with top_k=7"):
        refine(other, FloatLogits(tmp_path), top_k=7)
    with pytest.raises(BiasCompensationError, match="batch 0"):
        bc_plugin.refine(other, FloatLogits(tmp_path), token_batches(64, seed=9), config)
