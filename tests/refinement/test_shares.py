"""Refinement on several ranks, each of which gives its share of the sequences."""

import pytest
import torch
from helpers.ranks import on_ranks
from helpers.refinement import CALIBRATION, SETTINGS, compensated

import bc_plugin
from bc_plugin import BiasCompensationError, RefinementConfig, ranks

SHARES = {2: ((0, 27), (27, 40)), 3: ((0, 0), (0, 29), (29, 40))}
DATA = CALIBRATION[:40]
FEW = {**SETTINGS, "steps": 6, "evaluate_every": 3}
CASES = {
    # Fewer sequences in a batch than ranks, and several batches in a step.
    "model": {"batch_tokens": 32, "gradient_accumulation_steps": 3},
    "norms": {"batch_tokens": 80, "train": ("vectors", "norms")},
    "block": {"batch_tokens": 80, "by": "block", "gradient_accumulation_steps": 2},
}


def _refined(case, data, **settings):
    model, quantized = compensated(dtype="float32")
    config = RefinementConfig(**{**FEW, **CASES[case], **settings})
    found = bc_plugin.refine(quantized, model, data, config)
    norms = {k: v for k, v in quantized.state_dict().items() if "norm" in k}
    return found.vectors | norms, found.refined


def _on_a_rank(rank, shares):
    with ranks.together():
        return {case: _refined(case, DATA[slice(*shares[rank])]) for case in CASES}


@pytest.mark.parametrize("count", SHARES)
def test_steps_are_those_of_one_process(tmp_path, count):
    by_rank = on_ranks(count, tmp_path, _on_a_rank, SHARES[count])
    for case in CASES:
        expected, refined = _refined(case, DATA)
        assert refined["after"] < refined["before"]
        for found, measured in (of_all[case] for of_all in by_rank):
            assert found.keys() == expected.keys()
            for name, values in expected.items():
                torch.testing.assert_close(found[name], values, rtol=1e-3, atol=1e-4)
            assert measured["steps"] == refined["steps"]
            assert measured["before"] == pytest.approx(refined["before"], rel=1e-5)
            assert measured["after"] == pytest.approx(refined["after"], rel=1e-3)
        (first, _), *others = (of_all[case] for of_all in by_rank)
        for other, _ in others:
            assert all(torch.equal(other[name], first[name]) for name in first), case


def _refused(rank):
    with ranks.together(), pytest.raises(BiasCompensationError) as raised:
        _refined("model", DATA[slice(*SHARES[2][rank])], learning_rate=0.1 + rank)
    return str(raised.value)


def test_ranks_with_other_settings_are_refused(tmp_path):
    for message in on_ranks(2, tmp_path, _refused):
        assert "different models or vectors, or with different settings" in message
