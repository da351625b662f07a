"""Scales of quantized linears and gains of norms as parameters; integers stay as they are.

They move by factors, ``exp(step)``, since they differ by orders of magnitude.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm

from ..errors import BiasCompensationError
from ..models.forwards import ReplacedForward
from ..models.integers import (
    IntegerWeight,
    holding,
    integer_weights,
    linears_with_scales,
    overwrite,
    stored_scales,
)
from ..models.modules import device_of, dtype_of
from ..models.offloaded import lent
from .parameters import Trained

NO_SCALES = (
    "{} has no linear with integers and scales, so there are no scales to train. GPTQ, AWQ (gemm) "
    "and compressed-tensors (pack-quantized) have such; leave scales out of train."
)
OFFLOADED = (
    "the norm {} is offloaded, and its weight cannot be trained; leave norms out of train, or load "
    "the model whole."
)


class Factor(Trained):
    """A tensor times ``exp(step)``.

    Args:
        start: The tensor.
        kind: ``"scales"`` or ``"norms"``.
        device: Where it is trained.
        plus: What a module adds to it before it multiplies (Gemma's norms: 1).
    """

    def __init__(self, start: Tensor, kind: str, device: torch.device, plus: float = 0.0) -> None:
        self.kind, self.plus = kind, plus
        self.start = start.detach().to(device, torch.float32, copy=True)
        self.step = nn.Parameter(torch.zeros_like(self.start))

    def value(self) -> Tensor:
        """Where training is now, float32."""
        return (self.start + self.plus) * self.step.exp() - self.plus


class Offset(Trained):
    """A norm's bias, which may be 0, plus a step; 1 is as much as the norm's weight."""

    kind = "norms"

    def __init__(self, norm: nn.Module, device: torch.device) -> None:
        self.start = norm.bias.detach().to(device, torch.float32, copy=True)
        self.size = norm.weight.detach().to(self.start).square().mean().sqrt()
        self.step = nn.Parameter(torch.zeros_like(self.start))

    def value(self) -> Tensor:
        """Where training is now, float32."""
        return self.start + self.size * self.step


class ScaledProduct(torch.autograd.Function):
    """Inputs times a weight that is made of integers and scales when it is needed, and not kept.

    ``groups`` are None where they are of one size, and in the order of the inputs.
    """

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, scales: Tensor, integers: Tensor, groups: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(inputs, scales, integers, groups)
        return functional.linear(inputs, _weight(scales, integers, groups).to(inputs.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        inputs, scales, integers, groups = ctx.saved_tensors
        weight = _weight(scales, integers, groups).to(gradient.dtype)
        flat = inputs.flatten(0, -2).to(gradient.dtype)
        by_weight = (gradient.flatten(0, -2).T @ flat).to(scales.dtype).mul_(integers)
        if groups is None:
            by_scale = by_weight.view(*scales.shape, -1).sum(-1)
        else:
            by_scale = by_weight @ functional.one_hot(groups, scales.shape[1]).to(scales.dtype)
        return (gradient @ weight).to(inputs.dtype), by_scale, None, None


def _weight(scales: Tensor, integers: Tensor, groups: Tensor | None) -> Tensor:
    if groups is not None:
        return integers * scales[:, groups]
    return (integers.view(*scales.shape, -1) * scales[..., None]).view(integers.shape)


class ScaledForward(ReplacedForward):
    """A quantized linear's forward, with scales that can be trained.

    Args:
        module: The linear that is run.
        weight: What it consists of.
    """

    def __init__(self, module: nn.Module, weight: IntegerWeight) -> None:
        super().__init__(module)
        device = device_of(module)
        self.integers, groups = weight.integers.to(device), weight.groups
        size, rest = divmod(len(groups), weight.stored.shape[1])
        regular = torch.arange(len(groups), device=groups.device) // max(size, 1)
        self.groups = None if not rest and torch.equal(groups, regular) else groups.to(device)
        self.scales = Factor(weight.scales, "scales", device)

    def run(self, module: nn.Module, inputs: Tensor) -> Tensor:
        """The linear's output."""
        output = ScaledProduct.apply(inputs, self.scales.value(), self.integers, self.groups)
        bias = getattr(module, "bias", None)
        return output if bias is None else output + bias.to(output.dtype)


class NormForward(ReplacedForward):
    """A norm's forward, with a weight, and a bias where there is one, that can be trained."""

    def __init__(self, norm: nn.Module) -> None:
        device, bias, plus = device_of(norm), getattr(norm, "bias", None), _added_to_weight(norm)
        super().__init__(norm)
        self.weight = Factor(norm.weight, "norms", device, plus)
        self.bias = None if bias is None else Offset(norm, device)

    def run(self, norm: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """The norm's output."""
        output = self.plain(norm, *args, **kwargs)
        gain = self.weight.step.exp().to(output.dtype)
        if self.bias is None:
            return output * gain
        return (output - norm.bias) * gain + self.bias.value().to(output.dtype)


@torch.no_grad()
def _added_to_weight(norm: nn.Module) -> float:
    """What a norm adds to its weight before it multiplies: 0, or 1 as Gemma's."""
    row = torch.ones_like(norm.weight)[None]
    row[:, ::2] = -1  # of mean 0, so that LayerNorm leaves it as it is
    outputs = []
    for value in (0.0, 1.0):
        with holding(norm.weight, torch.full_like(norm.weight, value)):
            outputs.append(norm(row).float())
    bias = getattr(norm, "bias", None)
    nothing = outputs[0] if bias is None else outputs[0] - bias
    return float(round((nothing.norm() / (outputs[1] - outputs[0]).norm()).item()))


def norms_of(module: nn.Module) -> dict[str, nn.Module]:
    """The norms in a module that have a gain for each feature, by path; a shared one once."""
    return {
        path: child
        for path, child in module.named_modules()
        if type(child).__name__.endswith("Norm")
        and isinstance(getattr(child, "weight", None), nn.Parameter)
        and child.weight.dim() == 1
    }


def trainable(
    kinds: Sequence[str],
    model: nn.Module,
    name: str,
    copy_to_run: Callable[[nn.Module], nn.Module],
) -> tuple[str, ...]:
    """Those kinds that a model lets be trained; why others are not is told.

    Args:
        name: Path of a block, which stands for all.
    """
    block = model.get_submodule(name)
    pair, dtype = {name: (copy_to_run(block), block)}, dtype_of(model)
    found = []
    for kind in kinds:
        try:
            with trained_weights([kind], pair, {name: block}, dtype, copy_to_run):
                found.append(kind)
        except BiasCompensationError as error:
            tqdm.write(f"{kind} stay as they are: {error}")
    return tuple(found)


@contextmanager
def trained_weights(
    kinds: Sequence[str],
    blocks: Mapping[str, tuple[nn.Module, nn.Module]],
    around: Mapping[str, nn.Module],
    dtype: torch.dtype,
    copy_to_run: Callable[[nn.Module], nn.Module],
) -> Iterator[dict[str, Trained]]:
    """While it lasts, blocks run with scales and norms that can be trained.

    Args:
        kinds: Of ``"scales"`` and ``"norms"``, those to train.
        blocks: By path, what is run, and the block of the quantized model.
        around: By path, what is run and has norms: the whole model, or a block.
        dtype: The type the model computes in.
        copy_to_run: Makes of a quantized block the copy that is run.

    Returns:
        By the name of the tensor that each is to become: of a linear's scales ``<path>.scales``.

    Raises:
        BiasCompensationError: there is nothing of a kind, a linear's scales cannot be told from its
            integers, or a norm is offloaded.
    """
    found: dict[str, Trained] = {}
    with ExitStack() as stack:
        if "scales" in kinds:
            for name, (twin, original) in blocks.items():
                paths = linears_with_scales(original)
                if not paths:
                    raise BiasCompensationError(NO_SCALES.format(name))
                for path, weight in integer_weights(original, paths, copy_to_run, dtype).items():
                    linear = twin.get_submodule(path)
                    forward = ScaledForward(linear, weight)
                    stack.callback(forward.undo, linear)
                    found[f"{name}.{path}.scales"] = forward.scales
        if "norms" in kinds:
            for name, module in around.items():
                for path, norm in norms_of(module).items():
                    if norm.weight.is_meta:
                        raise BiasCompensationError(OFFLOADED.format(f"{name}.{path}"))
                    forward = NormForward(norm)
                    stack.callback(forward.undo, norm)
                    full = f"{name}.{path}" if name else path
                    found[f"{full}.weight"] = forward.weight
                    if forward.bias is not None:
                        found[f"{full}.bias"] = forward.bias
        yield found


def write_weights(model: nn.Module, values: Mapping[str, Tensor]) -> bool:
    """Set what ``trained_weights`` trained, by name, in the quantized model's own tensors.

    Returns:
        Whether any has another value now.
    """
    changed = False
    for name, value in values.items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        with lent(model, path):
            scales = leaf == "scales"
            own = stored_scales(path, module)[0] if scales else getattr(module, leaf).detach()
            before = own.clone()
            overwrite(own, value)
            changed |= not torch.equal(own, before)
    return changed
