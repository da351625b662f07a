"""Integers and scales in turn, held against trying everything."""

import itertools

import pytest
import torch

from bc_plugin.shift import descent
from bc_plugin.shift.descent import integers_and_scales

WIDTH, CHANNELS, TOKENS, BITS = 16, 6, 300, 3


def _problem(size=8, shuffled=False, seed=0):
    """A float weight, its rounding to nearest, and the covariance of its inputs."""
    torch.manual_seed(seed)
    weight = torch.randn(CHANNELS, WIDTH)
    inputs = torch.randn(TOKENS, WIDTH) @ torch.randn(WIDTH, WIDTH) + 3
    groups = torch.arange(WIDTH) // size
    if shuffled:
        groups = groups[torch.randperm(WIDTH)]
    count = WIDTH // size
    least, most = (
        torch.stack([getattr(weight[:, groups == g], each)(1) for g in range(count)], 1)
        for each in ("amin", "amax")
    )
    scales = ((most - least) / (2**BITS - 1)).half().float()
    zeros = (-least / scales).round()
    low, high = -zeros, 2**BITS - 1 - zeros
    integers = (weight / scales[:, groups]).round().clamp(low[:, groups], high[:, groups])
    return weight, integers, scales, low, high, groups, torch.cov(inputs.T, correction=0)


def _error(weight, integers, scales, groups, covariance):
    shift = (weight - integers * scales[:, groups]).double()
    return ((shift @ covariance.double()) * shift).sum(1)


def _turns(problem, turns, **others):
    weight, integers, scales, low, high, groups, covariance = problem
    return integers_and_scales(
        weight, integers, scales, low, high, groups, covariance, torch.float16, turns, **others
    )


@pytest.fixture
def undamped(monkeypatch):
    monkeypatch.setattr(descent, "DAMPING", 0.0)


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("columns", [128, 5, 1])
def test_each_turn_lowers_the_error_of_every_channel(monkeypatch, undamped, shuffled, columns):
    monkeypatch.setattr(descent, "COLUMNS", columns)
    problem = _problem(shuffled=shuffled)
    weight, integers, scales, low, high, groups, covariance = problem
    before = _error(weight, integers, scales, groups, covariance)
    first = before
    for turns in (1, 2, 4):
        integers, scales = _turns(problem, turns)
        after = _error(weight, integers, scales, groups, covariance)
        assert (after <= before * 1.0001).all()  # scales are rounded
        before = after
    assert before.sum() < 0.8 * first.sum()
    assert (before < _error(weight, integers, problem[2], groups, covariance)).all()  # with those
    assert torch.equal(integers, integers.round())
    assert ((low[:, groups] <= integers) & (integers <= high[:, groups])).all()
    assert torch.equal(scales, scales.half().float())


@pytest.mark.parametrize("shuffled", [False, True])
def test_in_the_end_no_integer_alone_could_be_better(monkeypatch, undamped, shuffled):
    problem = _problem(shuffled=shuffled)
    weight, _, scales, low, high, groups, covariance = problem
    integers, _ = _turns(problem, 1)
    # With the scales there are: the best of all values of one integer is the one that it has.
    monkeypatch.setattr(descent, "least_squares", lambda _, current, *rest: current.stored)
    for _ in range(20):
        problem = (weight, integers, *problem[2:])
        integers, scales = _turns(problem, 1)
    reached = _error(weight, integers, scales, groups, covariance)
    for column, value in itertools.product(range(WIDTH), range(-(2**BITS), 2**BITS)):
        other = integers.clone()
        other[:, column] = value
        allowed = (low[:, groups[column]] <= value) & (value <= high[:, groups[column]])
        error = _error(weight, other, scales, groups, covariance)
        assert (error >= reached - 1e-4)[allowed].all()


def test_the_order_of_blocks_of_columns_does_not_matter(monkeypatch):
    whole = _turns(_problem(), 3)
    monkeypatch.setattr(descent, "COLUMNS", 3)
    for one, other in zip(whole, _turns(_problem(), 3), strict=True):
        torch.testing.assert_close(one, other)


def test_inputs_that_never_vary_and_scales_of_zero_do_no_harm():
    weight, integers, scales, low, high, groups, covariance = _problem()
    covariance[2], covariance[:, 2], scales[0, 1] = 0.0, 0.0, 0.0
    descent_of = (weight, integers, scales, low, high, groups, covariance)
    found, better = _turns(descent_of, 2)
    assert found.isfinite().all()
    assert better.isfinite().all()
    before = _error(weight, integers, scales, groups, covariance)
    assert (_error(weight, found, better, groups, covariance) < before).all()
