"""A reference quantizer for the studies: uniform grids for weights and activations alike.

As post-training baselines have it, between the least and the greatest value seen; no layer is
searched or tuned. Either weights per output channel and activations per tensor, both asymmetric; or
both per tensor and symmetric, which is where PTQ4ViT (arXiv 2111.12293) begins its search, the
quantizer in the paper's table of vision transformers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn

TINY = torch.finfo(torch.float32).tiny
Grid = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


def asymmetric(low: Tensor, high: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Scales and zeros of grids over [low, high], each; the number 0 is always on them."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = ((high - low) / (levels - 1)).clamp(min=TINY)
    return scale, (-low / scale).round().to(torch.int32)


def symmetric(low: Tensor, high: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """The same of one grid for all, as wide on both sides of 0."""
    greatest = torch.maximum(low.abs(), high.abs()).max()
    scale = (greatest / (levels / 2 - 0.5)).clamp(min=TINY).expand_as(low).clone()
    return scale, torch.full_like(scale, levels // 2, dtype=torch.int32)


class _Uniform(nn.Module):
    """A layer whose weights and inputs are quantized.

    Stored are the weight's codes, uint8 of the weight's shape, with a scale, float32, and a zero,
    int32, for each output channel, and one scale and zero for the inputs.

    Args:
        layer: The float layer; its bias is shared.
        bits: Of the weights and of the inputs, each at most 8.
        low, high: The least and the greatest input seen, scalars.
        grid: ``asymmetric`` or ``symmetric``.
    """

    def __init__(
        self,
        layer: nn.Module,
        bits: tuple[int, int],
        low: Tensor,
        high: Tensor,
        grid: Grid = asymmetric,
    ) -> None:
        super().__init__()
        self.input_levels = 2 ** bits[1]
        weight = layer.weight.detach()
        ranges = weight.flatten(1).aminmax(dim=1)
        per_channel = (-1, *[1] * (weight.dim() - 1))
        scale, zero = (part.view(per_channel) for part in grid(*ranges, 2 ** bits[0]))
        codes = ((weight / scale).round() + zero).clamp(0, 2 ** bits[0] - 1)
        input_scale, input_zero = grid(low, high, self.input_levels)
        self.register_buffer("codes", codes.to(torch.uint8))
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)
        self.register_buffer("input_scale", input_scale)
        self.register_buffer("input_zero", input_zero)
        self.bias = layer.bias

    @property
    def weight(self) -> Tensor:
        """What the codes stand for."""
        return (self.codes - self.zero) * self.scale

    def input_values(self, inputs: Tensor) -> Tensor:
        """``inputs`` on their grid."""
        return torch.fake_quantize_per_tensor_affine(
            inputs, self.input_scale, self.input_zero, 0, self.input_levels - 1
        )


class UniformLinear(_Uniform):
    def __init__(self, layer: nn.Linear, *args: Any, **kwargs: Any) -> None:
        super().__init__(layer, *args, **kwargs)
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def forward(self, inputs: Tensor) -> Tensor:
        return nn.functional.linear(self.input_values(inputs), self.weight, self.bias)


class UniformConv2d(_Uniform):
    """Of a convolution that cuts images into patches: no padding, no groups."""

    def __init__(self, layer: nn.Conv2d, *args: Any, **kwargs: Any) -> None:
        super().__init__(layer, *args, **kwargs)
        self.stride = layer.stride

    def forward(self, inputs: Tensor) -> Tensor:
        return nn.functional.conv2d(self.input_values(inputs), self.weight, self.bias, self.stride)


KINDS = {nn.Linear: UniformLinear, nn.Conv2d: UniformConv2d}


@torch.no_grad()
def quantize(
    model: nn.Module,
    bits: tuple[int, int],
    calibration: Iterable[Mapping[str, Tensor]],
    keep: Sequence[str] = (),
    grid: Grid = asymmetric,
) -> nn.Module:
    """A copy of ``model`` with its linears and convolutions quantized.

    Args:
        bits: Of weights and of activations.
        calibration: Model inputs that the activations' ranges are taken from.
        keep: Patterns of the names of what stays float.
        grid: ``asymmetric`` or ``symmetric``.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if type(module) in KINDS and not any(fnmatch(name, each) for each in keep)
    }
    ranges: dict[str, tuple[Tensor, Tensor]] = {}

    def observe(name: str):
        def hook(_: nn.Module, args: tuple[Tensor]) -> None:
            low, high = args[0].aminmax()
            if name in ranges:
                low, high = low.minimum(ranges[name][0]), high.maximum(ranges[name][1])
            ranges[name] = low, high

        return hook

    hooks = [layer.register_forward_pre_hook(observe(name)) for name, layer in layers.items()]
    try:
        for inputs in calibration:
            model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    quantized = copy.deepcopy(model)
    for name, layer in layers.items():
        quantized.set_submodule(name, KINDS[type(layer)](layer, bits, *ranges[name], grid))
    return quantized
