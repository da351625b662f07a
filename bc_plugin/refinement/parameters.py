"""Vectors in place as parameters, in a quantized model whose weights stay as they are."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ..models.architectures import ARCHITECTURES
from ..models.blocks import device_of
from ..models.calls import copy_of
from ..models.positions import PositionTracker, rows_of
from ..vectors.attach import CompensatedForward, ReplacedForward
from ..vectors.compensation import Compensation


class TrainedForward(CompensatedForward):
    """A module's forward plus vectors that can be trained.

    They are ``start + scale * step``, where ``step`` is what the optimizer moves and ``scale`` the
    root mean square of each row at the start: vectors differ by orders of magnitude, that of an
    attention sink from its neighbours most of all, and so one learning rate fits all of them. What
    is left to correct may be far smaller than a vector, after joint quantization above all, so
    ``scale`` is at most half the root mean square of the error that remains.

    Args:
        module: A quantized linear or a block.
        start: (positions + 1, features), any type; trained in float32.
        error: The mean squared error of the module's output, per value, with these vectors.
        tracker: Tells which row each token uses.
    """

    def __init__(
        self, module: nn.Module, start: Tensor, error: float, tracker: PositionTracker
    ) -> None:
        self.start = start.detach().to(device_of(module), torch.float32)
        size = self.start.square().mean(-1, keepdim=True).sqrt()
        self.scale = size.clamp(max=0.5 * error**0.5)
        self.step = nn.Parameter(torch.zeros_like(self.start))
        super().__init__(module, tracker, shared_is_merged=False)

    def vectors(self) -> Tensor:
        """Where training is now, float32 (positions + 1, features)."""
        return self.start + self.scale * self.step

    def _add(self, hidden: Tensor, rows: Tensor | None) -> Tensor:
        vectors = self.vectors().to(hidden.device)
        if rows is None:
            return (hidden + vectors[-1]).to(hidden.dtype)
        # A product, since indexing has a slow backward pass.
        chosen = functional.one_hot(rows_of(rows, hidden), len(vectors)).to(vectors.dtype)
        return (hidden + chosen @ vectors).to(hidden.dtype)


class ThroughKernel(torch.autograd.Function):
    """A quantized linear whose kernel has no backward pass: its weight, dequantized, is one."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, kernel: Any, features: int) -> Tensor:
        ctx.kernel, ctx.features = kernel, features
        return kernel(inputs).clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        weight = dequantized(ctx.kernel, ctx.features, gradient)
        return gradient @ weight.T, None, None


@torch.no_grad()
def dequantized(kernel: Any, features: int, like: Tensor) -> Tensor:
    """The weight of a linear that can only be run, (in_features, out_features).

    What it gives for a unit vector is a row of the weight, and the bias, which zeros give alone.
    """
    units = torch.eye(features, dtype=like.dtype, device=like.device)
    return kernel(units) - kernel(torch.zeros_like(units[:1]))


class DifferentiableForward(ReplacedForward):
    """The forward of a quantized linear that has no backward pass of its own."""

    def run(self, inputs: Tensor) -> Tensor:
        """The kernel's output."""
        return ThroughKernel.apply(inputs, self.plain, self.module.in_features)


class CheckpointedForward(ReplacedForward):
    """A block's forward whose activations are computed again in the backward pass."""

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The block's output."""
        return checkpoint(self.plain, *args, use_reentrant=False, **kwargs)


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
    weight = dequantized(twin, linear.in_features, inputs)
    expected = 2 * output.detach().to(weight) @ weight.T
    return bool((found - expected).norm() <= 0.05 * expected.norm())


@contextmanager
def trained(
    modules: Mapping[str, nn.Module],
    compensation: Compensation,
    tracker: PositionTracker,
    fixed: Container[str] = (),
) -> Iterator[dict[str, TrainedForward]]:
    """While it lasts, some sites add vectors that can be trained.

    Args:
        modules: By site.
        compensation: Where their vectors start.
        fixed: Sites whose vectors are in place, but stay as they are.
    """
    with ExitStack() as stack:
        sites = {}
        for name, module in modules.items():
            error = compensation.errors[name].after
            site = TrainedForward(module, compensation.vectors[name], error, tracker)
            site.step.requires_grad_(name not in fixed)
            stack.callback(site.undo)
            sites[name] = site
        yield sites


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """While it lasts, no weight has a gradient and no dropout is at work."""
    wanted = {p: p.requires_grad for p in module.parameters()}
    training = module.training
    module.eval()
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        module.train(training)
        for parameter, value in wanted.items():
            parameter.requires_grad_(value)


@contextmanager
def differentiable(
    blocks: Sequence[nn.Module], dtype: torch.dtype, checkpointing: bool
) -> Iterator[None]:
    """While it lasts, gradients pass through every quantized linear in ``blocks``.

    Args:
        dtype: The type the model computes in.
        checkpointing: Compute activations within a block again when they are needed.
    """
    known: dict[type, bool] = {}
    with ExitStack() as stack:
        for block in blocks:
            for module in list(block.modules()):
                if not hasattr(module, "in_features") or isinstance(module, nn.Linear):
                    continue
                kind = type(module)
                if kind not in known:
                    known[kind] = has_gradient(module, dtype)
                if not known[kind]:
                    stack.callback(DifferentiableForward(module).undo)
            if checkpointing:
                stack.callback(CheckpointedForward(block).undo)
        yield


def merged_blocks(model: nn.Module, compensation: Compensation) -> set[str]:
    """Blocks whose vector would only repeat what that of their last linear can do."""
    config = getattr(model, "config", None)
    architecture = ARCHITECTURES.get(getattr(config, "model_type", ""))
    if architecture is None or architecture.last is None:
        return set()
    if architecture.factor(config.to_dict()) is None:
        return set()
    return {
        name
        for name, errors in compensation.errors.items()
        if errors.kind == "block" and f"{name}.{architecture.last}" in compensation.vectors
    }
