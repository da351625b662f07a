"""What the float model predicts, on disk, and what it is compared with."""

import copy

import pytest
import torch
from helpers.language import token_batches
from helpers.refinement import CALIBRATION, SETTINGS, compensated, refine

import bc_plugin
from bc_plugin import BiasCompensationError, FloatLogits, RefinementConfig
from bc_plugin.models.predictions import next_token_log_probabilities


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

    p, q = grouped(log_p), grouped(log_q)
    expected = (p * (p / q).log()).sum()
    whole = (log_p.exp() * (log_p - log_q)).sum()
    found = targets.divergence(0, log_q.float()).item()
    assert found == pytest.approx(expected.item(), rel=1e-4)
    assert found < whole.item()


def test_padding_is_not_counted(tmp_path):
    model, quantized = compensated()
    batch = token_batches(1, batch=2)[0]
    batch["attention_mask"][1, 10:] = 0
    targets = FloatLogits.record(model, [batch], tmp_path, top_k=None)
    with torch.no_grad():
        log_q = next_token_log_probabilities(quantized, batch)
    assert len(log_q) == 15 + 9
    expected = bc_plugin.evaluate(quantized, [batch], model).kl
    assert targets.divergence(0, log_q).item() / len(log_q) == pytest.approx(expected, rel=1e-4)


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
