"""Scales in closed form, held against least squares on the problem written out."""

import copy

import pytest
import torch
from helpers.grouped import GroupedLinear
from torch import nn

from bc_plugin.models.integers import IntegerWeight, integer_weights
from bc_plugin.shift import scales as closed_form
from bc_plugin.shift.covariance import InputCovariance
from bc_plugin.shift.scales import change_of_error, fitted_scales, least_squares

WIDTH, CHANNELS, TOKENS = 20, 12, 200


def _problem(**settings):
    """A float weight, the quantized linear, and its inputs, which vary together."""
    torch.manual_seed(0)
    linear = nn.Linear(WIDTH, CHANNELS, bias=False).double()
    block = nn.ModuleDict({"linear": GroupedLinear(linear, bits=2, **settings)})
    quantized = integer_weights(block, ["linear"], copy.deepcopy, torch.float64)["linear"]
    inputs = torch.randn(TOKENS, WIDTH).double() @ torch.randn(WIDTH, WIDTH).double() + 3
    return linear.weight.detach(), quantized, inputs


def _covariance(inputs):
    return torch.cov(inputs.T, correction=0)


def _error(weight, quantized, inputs, scales):
    """What the best bias leaves of the error, summed over channels."""
    shift = inputs @ (weight - quantized.integers * scales[:, quantized.groups]).T
    return (shift - shift.mean(0)).square().mean(0).sum()


SETTINGS = [{}, {"shuffled": True}, {"group_size": 6}, {"group_size": 20}]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("values", [1 << 23, 1])  # all channels at once, and one by one
def test_without_a_ridge_it_is_least_squares(monkeypatch, settings, values):
    monkeypatch.setattr(closed_form, "VALUES", values)
    weight, quantized, inputs = _problem(**settings)
    found = least_squares(weight, quantized, _covariance(inputs), ridge=0.0)
    centred = inputs - inputs.mean(0)
    members = nn.functional.one_hot(quantized.groups).double()
    for channel in range(CHANNELS):
        columns = centred @ (quantized.integers[channel][:, None] * members)
        expected = torch.linalg.lstsq(columns, (centred @ weight[channel])[:, None]).solution
        torch.testing.assert_close(found[channel], expected.squeeze(1))
    found.requires_grad_()
    error = _error(weight, quantized, inputs, found)
    (gradient,) = torch.autograd.grad(error, found)
    assert gradient.abs().max() < 1e-9 * error


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_ridge_holds_on_to_the_scales_there_are(settings):
    weight, quantized, inputs = _problem(**settings)
    before = quantized.scales
    found = least_squares(weight, quantized, _covariance(inputs), ridge=0.3).requires_grad_()
    members = nn.functional.one_hot(quantized.groups).double()
    columns = quantized.integers[..., None] * members
    normal = torch.einsum("oig,ij,ojh->ogh", columns, _covariance(inputs), columns)
    held = 0.3 * (normal.diagonal(dim1=1, dim2=2) * (found - before).square()).sum()
    error = _error(weight, quantized, inputs, found)
    (gradient,) = torch.autograd.grad(error + held, found)
    assert gradient.abs().max() < 1e-9 * error
    assert error + held < _error(weight, quantized, inputs, before)


def test_the_change_of_the_error_is_that_of_the_outputs():
    weight, quantized, inputs = _problem(shuffled=True)
    scales = quantized.scales * (1 + torch.rand(CHANNELS, 3).double())
    change = change_of_error(weight, quantized, _covariance(inputs), scales)
    before, after = (_error(weight, quantized, inputs, s) for s in (quantized.scales, scales))
    assert change == pytest.approx((after - before).item())


def test_the_change_of_the_error_with_other_integers_as_well():
    weight, quantized, inputs = _problem(shuffled=True)
    scales = quantized.scales * (1 + torch.rand(CHANNELS, 3).double())
    integers = quantized.integers + torch.randint(-1, 2, quantized.integers.shape).float()
    change = change_of_error(weight, quantized, _covariance(inputs), scales, integers)
    others = IntegerWeight(integers, quantized.groups, quantized.stored)
    before = _error(weight, quantized, inputs, quantized.scales)
    assert change == pytest.approx((_error(weight, others, inputs, scales) - before).item())


def test_a_group_that_says_nothing_keeps_its_scale():
    weight, quantized, inputs = _problem()
    quantized.integers[3, quantized.groups == 1] = 0
    inputs[:, quantized.groups == 2] = 1.5
    found = least_squares(weight, quantized, _covariance(inputs))
    assert found[3, 1] == quantized.scales[3, 1]
    torch.testing.assert_close(found[:, 2], quantized.scales[:, 2])
    assert bool((found[:, 0] != quantized.scales[:, 0]).all())


def test_a_channel_whose_best_scales_are_no_scales_keeps_its_own():
    weight, quantized, inputs = _problem()
    weight[5] *= -1
    found = fitted_scales(weight, quantized, _covariance(inputs), None)
    assert torch.equal(found[5], quantized.scales[5])
    assert bool((found > 0).all())
    assert not torch.equal(found[4], quantized.scales[4])


def test_what_was_held_out_decides():
    weight, quantized, inputs = _problem()
    assert fitted_scales(weight, quantized, _covariance(inputs), _covariance(inputs)) is not None
    few = _covariance(inputs[:4])  # fits these alone
    assert fitted_scales(weight, quantized, few, _covariance(inputs), ridge=1e-6) is None


def test_the_covariance_is_about_the_mean_that_the_bias_takes_out():
    _, _, inputs = _problem()
    inputs = inputs.float() + 1000
    statistics = InputCovariance()
    for start in range(0, 100, 20):
        statistics.update(inputs[start : start + 20], apart=False)
        statistics.update(inputs[start + 100 : start + 120], apart=True)
    fitted, apart = inputs[:100].double(), inputs[100:].double()
    torch.testing.assert_close(statistics.fitted(), _covariance(fitted), rtol=1e-4, atol=1e-3)
    shifted = apart - fitted.mean(0)
    torch.testing.assert_close(statistics.apart(), shifted.T @ shifted / 100, rtol=1e-4, atol=1e-3)
    alone = InputCovariance()
    alone.update(fitted, apart=False)
    assert alone.apart() is None
