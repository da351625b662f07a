"""Integers and scales, told apart by running a kernel. Real kernels: integration/tests/toolkits."""

import copy

import pytest
import torch
from helpers.grouped import GroupedLinear
from torch import nn

from bc_plugin import BiasCompensationError
from bc_plugin.models.integers import integer_weights


def _block(kind=GroupedLinear, bias=True, dtype=torch.float32, **settings):
    torch.manual_seed(0)
    linear = nn.Linear(20, 12, bias=bias).to(dtype)
    return nn.ModuleDict({"linear": kind(linear, **settings)})


def _read(block, dtype=torch.float32):
    return integer_weights(block, ["linear"], copy.deepcopy, dtype)["linear"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("settings", [{"bits": 2}, {"shuffled": True}, {"bits": 8}])
def test_they_are_what_the_weight_is_made_of(dtype, settings):
    block = _block(dtype=dtype, **settings)
    before = copy.deepcopy(block.state_dict())
    found, linear = _read(block, dtype), block.linear
    expected = (linear.qweight - linear.qzeros[linear.g_idx]).T
    assert torch.equal(found.integers.int(), expected.int())
    assert torch.equal(found.scales, linear.scales.T.double())
    assert torch.equal(found.groups, linear.g_idx.long())
    assert all(torch.equal(before[name], tensor) for name, tensor in block.state_dict().items())


def test_what_is_written_is_what_the_kernel_multiplies_with():
    block = _block(shuffled=True)
    found, before = _read(block), block.linear.scales.clone()
    found.write(found.scales)
    assert torch.equal(block.linear.scales, before)
    scales = found.scales * torch.rand_like(found.scales)
    found.write(scales)
    inputs = torch.randn(4, 20)
    expected = inputs.double() @ (found.integers * scales[:, found.groups]).T + block.linear.bias
    torch.testing.assert_close(block.linear(inputs).double(), expected, rtol=1e-5, atol=1e-5)


def test_what_a_toolkit_made_in_inference_mode_is_written_as_well():
    with torch.inference_mode():
        block = _block()
    found, before = _read(block), block.linear.scales.T.double()
    found.write(found.scales * 2)
    assert torch.equal(block.linear.scales.T.double(), 2 * before)


class Permuted(GroupedLinear):
    """A kernel that has its scales in an order of its own."""

    def dense(self):
        scales = self.scales.roll(1, 1)
        return scales[self.g_idx] * (self.qweight - self.qzeros[self.g_idx])


class Private(GroupedLinear):
    """A kernel that has made of its scales something else."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.own = super().dense() / 100  # such weights are all near 0

    def dense(self):
        return self.own


class Broken(GroupedLinear):
    def forward(self, inputs):
        raise ValueError("no kernel for this machine")


@pytest.mark.parametrize(
    ("kind", "why"),
    [(Permuted, "repacked"), (Private, "repacked"), (Broken, "no kernel for this machine")],
)
def test_a_kernel_that_has_its_scales_elsewhere_is_refused(kind, why):
    block = _block(kind)
    before = copy.deepcopy(block.state_dict())
    with pytest.raises(BiasCompensationError, match=rf"linear is a {kind.__name__}.*{why}"):
        _read(block)
    assert all(torch.equal(before[name], tensor) for name, tensor in block.state_dict().items())


def test_other_formats_are_refused():
    with pytest.raises(
        BiasCompensationError, match=r"is a Linear.*GPTQ, AWQ .* compressed-tensors"
    ):
        integer_weights(nn.ModuleDict({"linear": nn.Linear(4, 4)}), ["linear"], copy.deepcopy, None)


@pytest.mark.parametrize(
    "change",
    [
        lambda linear: setattr(linear, "scales", linear.scales.T.contiguous()),
        lambda linear: setattr(linear, "scales", None),
        lambda linear: setattr(linear, "scales", linear.scales[:1]),
    ],
    ids=["shape", "none", "fewer groups"],
)
def test_tensors_that_do_not_fit_are_refused(change):
    block = _block()
    change(block.linear)
    with pytest.raises(BiasCompensationError, match="cannot be told apart"):
        _read(block)
