"""A reference quantizer for the studies: uniform grids for weights and activations alike.

As post-training baselines have it: weights per output channel, activations per tensor, both
asymmetric between the least and the greatest value seen; no layer is searched or tuned.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatch

import torch
from torch import Tensor, nn


class _Uniform(nn.Module):
    """A layer whose weights and inputs are quantized.

    Stored are the weight's codes, uint8 of the weight's shape, with a scale, float32, and a zero,
    int32, for each output channel, and one scale and zero for the inputs.

    Args:
        layer: The float layer; its bias is shared.
        bits: Of the weights and of the inputs, each at most 8.
        low, high: The least and the greatest input seen, scalars.
    """

    def __init__(self, layer: nn.Module, bits: tuple[int, int], low: Tensor, high: Tensor) -> None:
        super().__init__()
        self.input_levels = 2 ** bits[1]
        weight = layer.weight.detach()
        ranges = weight.flatten(1).aminmax(dim=1)
        per_channel = (-1, *[1] * (weight.dim() - 1))
        scale, zero = (part.view(per_channel) for part in _grid(*ranges, 2 ** bits[0]))
        codes = ((weight / scale).round() + zero).clamp(0, 2 ** bits[0] - 1)
        input_scale, input_zero = _grid(low, high, self.input_levels)
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
    def __init__(self, layer: nn.Linear, bits: tuple[int, int], low: Tensor, high: Tensor) -> None:
        super().__init__(layer, bits, low, high)
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def forward(self, inputs: Tensor) -> Tensor:
        return nn.functional.linear(self.input_values(inputs), self.weight, self.bias)


class UniformConv2d(_Uniform):
    """Of a convolution that cuts images into patches: no padding, no groups."""

    def __init__(self, layer: nn.Conv2d, bits: tuple[int, int], low: Tensor, high: Tensor) -> None:
        super().__init__(layer, bits, low, high)
        self.stride = layer.stride

    def forward(self, inputs: Tensor) -> Tensor:
        return nn.functional.conv2d(self.input_values(inputs), self.weight, self.bias, self.stride)


KINDS = {nn.Linear: UniformLinear, nn.Conv2d: UniformConv2d}


def _grid(low: Tensor, high: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Scale and zero of a grid over [low, high]; the number 0 is always on it."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = ((high - low) / (levels - 1)).clamp(min=torch.finfo(torch.float32).tiny)
    return scale, (-low / scale).round().to(torch.int32)


@torch.no_grad()
def quantize(
    model: nn.Module,
    bits: tuple[int, int],
    calibration: Iterable[Mapping[str, Tensor]],
    keep: Sequence[str] = (),
) -> nn.Module:
    """A copy of ``model`` with its linears and convolutions quantized.

    Args:
        bits: Of weights and of activations.
        calibration: Model inputs that the activations' ranges are taken from.
        keep: Patterns of the names of what stays float.
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
        quantized.set_submodule(name, KINDS[type(layer)](layer, bits, *ranges[name]))
    return quantized
