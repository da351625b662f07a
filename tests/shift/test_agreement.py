"""What tells rounding from another model, from rotated weights and from moved scales."""

import math

import pytest
import torch

from bc_plugin.shift.agreement import (
    AT_ONCE,
    BLOCK,
    EACH,
    ENOUGH,
    FACTORS,
    FEW,
    LINEAR,
    Agreement,
    Covariances,
)

TOKENS, FEATURES = 400, 64


def _random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _agreement(reference, output, given=None, least=LINEAR):
    agreement = Agreement(least)
    for rows in torch.arange(len(reference)).split(50):
        values = [reference[rows], (output - reference)[rows]]
        agreement.update(torch.stack(values if given is None else [*values, given[rows]]))
    return agreement


def _outputs(rank=FEATURES):
    inputs = _random(TOKENS, rank, seed=1) @ _random(rank, FEATURES, seed=2) + 3
    return inputs, _random(FEATURES, FEATURES, seed=3)


@pytest.mark.parametrize("noise", [0.0, 0.1, 1.0])
def test_correlation_is_that_of_all_channels_together(noise):
    reference = _random(TOKENS, FEATURES) + 5
    output = reference + noise * _random(TOKENS, FEATURES, seed=1) + 2
    both = torch.stack([(x - x.mean(0)).flatten() for x in (reference, output)])
    expected = torch.corrcoef(both)[0, 1].item()
    assert _agreement(reference, output).correlation() == pytest.approx(expected, abs=1e-9)


def test_what_a_blocks_input_explains_counts_for_neither():
    given = 10 * _random(TOKENS, FEATURES)
    reference = given + _random(TOKENS, FEATURES, seed=1)
    other = given + _random(TOKENS, FEATURES, seed=2)
    assert _agreement(reference, other).correlation() > 0.9
    assert _agreement(reference, other, given, BLOCK).is_missing
    near = reference + _random(TOKENS, FEATURES, seed=3)
    assert _agreement(reference, near, given).correlation() == pytest.approx(0.5**0.5, abs=0.05)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("rank", [1, 2, FEATURES])
def test_rounding_is_no_factor_however_few_directions_inputs_have(rank, bits):
    inputs, weight = _outputs(rank)
    step = 2 * weight.abs().amax() / (2**bits - 1)
    agreement = _agreement(inputs @ weight, inputs @ ((weight / step).floor() + 0.5).mul(step))
    assert agreement.correlation() > 0.8
    assert abs(agreement.factors()) < 0.1
    assert not agreement.is_missing


def test_shrinking_all_channels_alike_is_no_factor():
    inputs, weight = _outputs()
    agreement = _agreement(inputs @ weight, inputs @ (0.5 * weight) + 0.1 * _random(TOKENS, 64))
    assert agreement.factors() < 0.1


@pytest.mark.parametrize("spread", [0.2, 0.7])
def test_a_factor_for_each_channel_is_noticed(spread):
    inputs, weight = _outputs()
    factors = (spread * _random(FEATURES, seed=4)).exp()
    rounded = (weight * factors / 0.2).round() * 0.2
    agreement = _agreement(inputs @ weight, inputs @ rounded)
    assert agreement.correlation() > LINEAR  # that would not do
    assert agreement.factors() > FACTORS
    assert agreement.is_missing


def test_one_token_much_larger_than_others_hides_no_factor():
    inputs, weight = _outputs()
    inputs[7] *= 1e4
    factors = (0.7 * _random(FEATURES, seed=4)).exp()
    assert _agreement(inputs @ weight, inputs @ (weight * factors)).factors() > 0.9


@pytest.mark.parametrize(
    ("reference", "output"),
    [
        (torch.ones(TOKENS, 8), torch.rand(TOKENS, 8)),
        (torch.rand(TOKENS, 8), torch.ones(TOKENS, 8)),
        (torch.rand(FEW - 1, 8), torch.rand(FEW - 1, 8)),
    ],
    ids=["constant", "rounded away", "few tokens"],
)
def test_where_nothing_can_be_told_nothing_is_said(reference, output):
    agreement = _agreement(reference, output)
    assert math.isnan(agreement.correlation())
    assert not agreement.is_missing


def test_no_more_tokens_than_needed():
    agreement = Agreement(LINEAR)
    while not agreement.is_full:
        agreement.update(_random(2, 300, 8))
    assert agreement.together.tokens == agreement.channels.tokens == ENOUGH


def test_few_tokens_are_wide_at_once(monkeypatch):
    """Of wide linears, float64 copies of a whole batch were close to a tenth of its memory."""
    seen, update = [], Covariances.update
    monkeypatch.setattr(
        Covariances, "update", lambda self, values: seen.append(values) or update(self, values)
    )
    agreement = Agreement(LINEAR)
    agreement.update(torch.randn(2, EACH, 4))
    assert agreement.together.tokens == agreement.channels.tokens == EACH
    assert max(values.shape[1] for values in seen) == AT_ONCE
