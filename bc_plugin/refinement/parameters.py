"""Vectors in place as parameters, in a quantized model whose weights stay as they are."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..models.architectures import ARCHITECTURES
from ..models.modules import device_of
from ..models.tracker import PositionTracker
from ..vectors.compensation import Compensation
from ..vectors.in_place import CompensatedForward


class Trained:
    """Something that is trained.

    Attributes:
        kind: ``"vectors"``, ``"scales"`` or ``"norms"``.
        step: What the optimizer moves; zeros at the start.
    """

    kind: str
    step: nn.Parameter

    def value(self) -> Tensor:
        """Where training is now, float32."""
        raise NotImplementedError


class TrainedForward(CompensatedForward, Trained):
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

    kind = "vectors"

    def value(self) -> Tensor:
        """Where training is now, float32 (positions + 1, features)."""
        return self.start + self.scale * self.step

    @torch.no_grad()
    def take_out(self) -> None:
        """Move the step to where the vectors are zeros, but for those that cannot move."""
        self.step.copy_(torch.where(self.scale > 0, -self.start / self.scale, 0))

    def _add(self, module: nn.Module, hidden: Tensor, rows: Tensor | None) -> Tensor:
        vectors = self.value().to(hidden.device)
        if rows is None:
            return (hidden + vectors[-1]).to(hidden.dtype)
        # A product, since indexing has a slow backward pass.
        chosen = functional.one_hot(rows, len(vectors)).to(vectors.dtype)
        return (hidden + chosen @ vectors).to(hidden.dtype)


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
            stack.callback(site.undo, module)
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
        for name, kind in compensation.kinds.items()
        if kind == "block" and f"{name}.{architecture.last}" in compensation.vectors
    }
