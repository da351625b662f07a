"""Vectors in place: what a model does with them, and that it is as before without them."""

import copy

import pytest
import torch
from helpers.vectors import logits, pair
from torch import nn

from bc_plugin import BiasCompensationError, Compensation


@pytest.mark.parametrize("positions", [0, 1])
@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt2"])
def test_attach_then_detach_gives_the_same_outputs_bit_for_bit(architecture, positions):
    quantized, compensation = pair(architecture, positions)
    before, state = logits(quantized), copy.deepcopy(quantized.state_dict())
    compensation.attach(quantized)
    assert Compensation.attached_to(quantized) is compensation
    assert not torch.equal(logits(quantized), before)
    compensation.detach(quantized)
    assert Compensation.attached_to(quantized) is None
    assert torch.equal(logits(quantized), before)
    assert list(quantized.state_dict()) == list(state)
    for module in quantized.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert "forward" not in vars(module)


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_a_plain_bias_leaves_a_linears_forward_alone(architecture):
    quantized, compensation = pair(architecture, positions=0)
    compensation.attach(quantized)
    for name, kind in compensation.kinds.items():
        module = quantized.get_submodule(name)
        assert ("forward" in vars(module)) == (kind == "block")


def test_only_vectors_are_added_to_the_state_dict():
    quantized, compensation = pair("opt")
    before = copy.deepcopy(quantized.state_dict())
    compensation.attach(quantized)
    after = quantized.state_dict()
    added = {f"{name}.bias_compensation" for name in compensation.vectors}
    assert set(after) - set(before) == added
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_a_state_dict_loaded_into_a_compensated_model_keeps_it_compensated(architecture):
    quantized, compensation = pair(architecture, positions=0)
    compensation.attach(quantized)
    expected, state = logits(quantized), copy.deepcopy(quantized.state_dict())
    for tensor in quantized.state_dict().values():
        tensor.zero_()
    quantized.load_state_dict(state)
    assert torch.equal(logits(quantized), expected)


def test_a_compensated_model_can_change_its_type():
    quantized, compensation = pair("opt")
    compensation.attach(quantized)
    expected = logits(quantized)
    torch.testing.assert_close(logits(quantized.double()).float(), expected, rtol=1e-4, atol=1e-4)


def test_attaching_twice_is_refused():
    quantized, compensation = pair()
    compensation.attach(quantized)
    with pytest.raises(BiasCompensationError, match="already"):
        compensation.attach(quantized)


def test_detaching_what_is_not_attached_is_refused():
    quantized, compensation = pair()
    with pytest.raises(BiasCompensationError, match="not attached"):
        compensation.detach(quantized)


def test_a_kernel_with_a_bias_of_another_order_is_left_alone():
    class Permuted(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(x, self.weight, self.bias.flip(0))

    class BuiltOnce(nn.Linear):
        def __init__(self, *args):
            super().__init__(*args)
            self.kernel = [self.weight, self.bias]

        def forward(self, x):
            return nn.functional.linear(x, *self.kernel)

    from bc_plugin.models.tracker import PositionTracker
    from bc_plugin.vectors.in_place import AttachedSite

    for kind in (Permuted, BuiltOnce):
        module = kind(8, 6)
        x = torch.randn(2, 3, 8)
        expected = module(x) + torch.arange(6.0)
        site = AttachedSite(module, torch.arange(6.0)[None], PositionTracker(0), torch.float32)
        assert site.merged is None
        torch.testing.assert_close(module(x), expected)


def test_detaching_under_a_forward_wrapped_since_still_takes_the_vectors_out():
    quantized, compensation = pair()
    before = logits(quantized)
    compensation.attach(quantized)
    block = quantized.model.layers[0]
    ours = block.forward
    block.forward = lambda *args, **kwargs: ours(*args, **kwargs)  # as accelerate does
    compensation.detach(quantized)
    assert torch.equal(logits(quantized), before)
