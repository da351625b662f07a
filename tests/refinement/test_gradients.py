"""Gradients through what autograd cannot follow, and through what is computed twice."""

import copy

import pytest
import torch
from helpers.language import crudely_quantized, tiny_model
from helpers.refinement import CALIBRATION, compensated, refine
from torch import nn

import bc_plugin
from bc_plugin.refinement.train import Training


def test_recomputed_activations_give_the_same():
    model, quantized = compensated()
    other = copy.deepcopy(quantized)
    expected = refine(quantized, model)
    found = refine(other, model, gradient_checkpointing=True)
    for name, vectors in expected.vectors.items():
        torch.testing.assert_close(found.vectors[name], vectors)


class WithoutBackward(nn.Module):
    """A quantized linear whose kernel autograd cannot follow."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("packed", linear.weight.detach())
        self.register_buffer("bias", linear.bias)

    def forward(self, inputs):
        return nn.functional.linear(inputs.detach(), self.packed, self.bias)


class DecidedWhenFirstRun(WithoutBackward):
    """One whose kernel has a backward pass if its first input wants a gradient, as gptqmodel's."""

    followed = None

    def forward(self, inputs):
        if self.followed is None:
            self.followed = inputs.requires_grad
        if not self.followed:
            return super().forward(inputs)
        return nn.functional.linear(inputs, self.packed, self.bias)


class RoundsAsDecided(DecidedWhenFirstRun):
    """One whose two ways round differently, as gptqmodel's do on a CPU."""

    def forward(self, inputs):
        output = super().forward(inputs)
        return output if self.followed else output.bfloat16().float()


def with_kernels(model, kernel):
    """The same model, its linears run by a kernel."""
    for block in model.model.layers:
        for parent in (block.self_attn, block.mlp):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, kernel(child))
    return model


@pytest.mark.parametrize("kernel", [WithoutBackward, DecidedWhenFirstRun])
@pytest.mark.parametrize("by", ["model", "block"])
def test_a_kernel_without_a_backward_pass_trains_as_well(by, kernel):
    model = tiny_model()
    quantized = crudely_quantized(model)
    other = with_kernels(copy.deepcopy(quantized), kernel)
    results = []
    for one in (quantized, other):
        bc_plugin.compensate(one, model, CALIBRATION, {"held_out": 0}).attach(one)
        results.append(refine(one, model, by=by))
    assert results[0].refined["after"] < results[0].refined["before"]
    for name, vectors in results[0].vectors.items():
        torch.testing.assert_close(results[1].vectors[name], vectors, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("by", ["model", "block"])
def test_what_a_kernel_decides_when_first_run_is_the_same_after_a_stop(tmp_path, monkeypatch, by):
    model = tiny_model()
    quantized = with_kernels(crudely_quantized(model), RoundsAsDecided)
    compensation = bc_plugin.compensate(quantized, model, CALIBRATION, {"held_out": 0})
    found, step = [], Training._step

    def stopped(self, number):
        if number == 5:
            raise KeyboardInterrupt
        return step(self, number)

    for folder in (None, tmp_path):
        one = copy.deepcopy(quantized)
        compensation.attach(one)
        if folder is not None:
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(Training, "_step", stopped)
                refine(one, model, folder, by=by)
        found.append(refine(one, model, folder, by=by))
    for name, vectors in found[0].vectors.items():
        assert torch.equal(found[1].vectors[name], vectors)
