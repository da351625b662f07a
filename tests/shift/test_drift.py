"""The weight that makes up for what the layers before have lost."""

import pytest
import torch

from bc_plugin.shift.drift import weight_for


@pytest.mark.parametrize("damping", [0.01, 1.0])
def test_rounding_it_comes_close_to_the_float_outputs(damping):
    """Its error and that of the outputs, with the ridge, differ by what no rounding can change."""
    ours = torch.randn(300, 12, dtype=torch.float64)
    floats = ours + 0.3 * torch.randn_like(ours) + 0.2 * ours.roll(1, 1)
    weight = torch.randn(5, 12, dtype=torch.float64)
    covariance, drift = ours.T @ ours, (floats - ours).T @ ours
    wanted = weight_for(weight, covariance, drift, damping).double()
    ridge = damping * covariance.diagonal().mean()
    differences = []
    for step in (0.1, 0.5, 2.0):
        rounded = (weight / step).round() * step
        shift = wanted - rounded
        mine = (shift @ (covariance + ridge * torch.eye(12)) * shift).sum(1)
        outputs = (floats @ weight.T - ours @ rounded.T).square().sum(0)
        differences.append(outputs + ridge * (weight - rounded).square().sum(1) - mine)
    for difference in differences[1:]:
        torch.testing.assert_close(difference, differences[0], rtol=1e-4, atol=1e-3)


def test_without_drift_it_is_the_weight():
    inputs, weight = torch.randn(40, 8), torch.randn(3, 8)
    found = weight_for(weight, inputs.T @ inputs, torch.zeros(8, 8), 0.01)
    assert torch.equal(found, weight)


def test_without_inputs_it_is_the_weight():
    weight = torch.randn(3, 8)
    assert torch.equal(weight_for(weight, torch.zeros(8, 8), torch.zeros(8, 8), 0.01), weight)
