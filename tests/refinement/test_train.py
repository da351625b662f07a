"""The loop of training: its steps, and its life beyond a stop."""

import copy

import pytest
import torch
from helpers.language import token_batches
from helpers.refinement import compensated, refine

from bc_plugin import BiasCompensationError, Compensation
from bc_plugin.refinement.progress import delete_progress
from bc_plugin.refinement.train import Training, learning_rate_factor


def logits(model):
    with torch.no_grad():
        return model(**token_batches(1, seed=5)[0]).logits


@pytest.mark.parametrize("by", ["model", "block"])
def test_a_stopped_run_goes_on_from_where_it_was(tmp_path, monkeypatch, by):
    model, quantized = compensated()
    other = copy.deepcopy(quantized)
    expected = refine(other, model, by=by)
    step, made = Training._step, []

    def counted(self, number):
        made.append(number)
        return step(self, number)

    def stopped(self, number):
        if len(made) == (6 if by == "model" else 18):
            raise KeyboardInterrupt
        return counted(self, number)

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("somebody's own")
    before = Compensation.attached_to(quantized)
    reference = logits(quantized)
    monkeypatch.setattr(Training, "_step", stopped)
    with pytest.raises(KeyboardInterrupt):
        refine(quantized, model, tmp_path / "run", by=by)
    assert Compensation.attached_to(quantized) is before
    assert torch.equal(logits(quantized), reference)
    made.clear()
    monkeypatch.setattr(Training, "_step", counted)
    with pytest.raises(BiasCompensationError, match="another"):
        refine(quantized, model, tmp_path / "run", by=by, learning_rate=0.01)
    found = refine(quantized, model, tmp_path / "run", by=by)
    assert len(made) == (8 if by == "model" else 12 + 8)  # from the last look on
    for name, vectors in expected.vectors.items():
        assert torch.equal(found.vectors[name], vectors)
    delete_progress(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_accumulated_gradients_are_those_of_one_large_batch():
    model, quantized = compensated(dtype="float32")
    other = copy.deepcopy(quantized)
    # All 48 sequences are trained on in each step, either way.
    expected = refine(quantized, model, batch_tokens=48 * 16)
    found = refine(other, model, batch_tokens=256, gradient_accumulation_steps=3)
    for name, vectors in expected.vectors.items():
        torch.testing.assert_close(found.vectors[name], vectors, rtol=1e-2, atol=1e-4)


def test_warm_up_and_cosine():
    factors = [learning_rate_factor(step, 20, 0.2) for step in range(20)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[4:] == sorted(factors[4:], reverse=True)
    assert 0 < factors[-1] < 0.05
