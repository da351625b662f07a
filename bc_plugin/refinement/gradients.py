"""Gradients through quantized linears, whose kernels may have no backward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..models.forwards import ReplacedForward
from ..models.modules import copy_of, device_of


class ThroughKernel(torch.autograd.Function):
    """A quantized linear whose kernel has no backward pass: its weight, weight_through, is one."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, kernel: Any, features: int) -> Tensor:
        ctx.kernel, ctx.features = kernel, features
        return kernel(inputs).clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        weight = weight_through(ctx.kernel, ctx.features, gradient)
        return gradient @ weight.T, None, None


@torch.no_grad()
def weight_through(kernel: Any, features: int, like: Tensor) -> Tensor:
    """The weight of a linear that can only be run, (in_features, out_features).

    What it gives for a unit vector is a row of the weight, and the bias, which zeros give alone.
    """
    units = torch.eye(features, dtype=like.dtype, device=like.device)
    return kernel(units) - kernel(torch.zeros_like(units[:1]))


class DifferentiableForward(ReplacedForward):
    """The forward of a quantized linear that has no backward pass of its own."""

    def run(self, module: nn.Module, inputs: Tensor) -> Tensor:
        """The kernel's output."""
        return ThroughKernel.apply(inputs, partial(self.plain, module), module.in_features)


class CheckpointedForward(ReplacedForward):
    """A block's forward whose activations are computed again in the backward pass."""

    def run(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The block's output."""
        return checkpoint(self.plain, module, *args, use_reentrant=False, **kwargs)


def has_gradient(linear: nn.Module, dtype: torch.dtype) -> bool:
    """Whether the kernel of a quantized linear passes the right gradient to its input."""
    twin = copy_of(linear)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(4, linear.in_features, generator=generator)
    inputs = inputs.to(device_of(linear), dtype)
    with torch.enable_grad():
        try:
            twin(inputs)  # some decide for good, when first run, whether gradients are wanted
            inputs.requires_grad_()
            output = twin(inputs)
            (found,) = torch.autograd.grad(output.float().square().sum(), inputs)
        except Exception:  # kernels fail in many ways; each of them means no
            return False
    weight = weight_through(twin, linear.in_features, inputs)
    expected = 2 * output.detach().to(weight) @ weight.T
    return bool((found - expected).norm() <= 0.05 * expected.norm())


@torch.no_grad()
def settle(linear: nn.Module, dtype: torch.dtype) -> None:
    """Have a kernel decide now what it decides when first run, and always the same.

    Otherwise it would depend on which data comes first, and with or without a gradient: a run that
    goes on after a stop would not compute what it had computed before.
    """
    row = torch.zeros(1, linear.in_features, dtype=dtype, device=device_of(linear))
    with suppress(Exception):  # what takes no such row decides later on
        linear(row)


@contextmanager
def differentiable(
    blocks: Sequence[nn.Module], dtype: torch.dtype, checkpointing: bool
) -> Iterator[None]:
    """While it lasts, gradients pass through every quantized linear in ``blocks``.

    Each of them is run once.

    Args:
        dtype: The type the model computes in.
        checkpointing: Compute activations within a block again when they are needed.
    """
    known: dict[type, bool] = {}
    with ExitStack() as stack:
        for block in blocks:
            for module in list(block.modules()):
                kind = type(module)
                if not hasattr(module, "in_features") or kind is nn.Linear:
                    continue
                if kind not in known:
                    known[kind] = isinstance(module, nn.Linear) or has_gradient(module, dtype)
                settle(module, dtype)
                if not known[kind]:
                    stack.callback(DifferentiableForward(module).undo, module)
            if checkpointing:
                stack.callback(CheckpointedForward(block).undo, block)
        yield
