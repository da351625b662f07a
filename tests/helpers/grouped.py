"""Linears in groups with scales and zero points, as the kernels of GPTQ toolkits hold them."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class GroupedLinear(nn.Module):
    """Integers, zero points, scales and the groups of the inputs, of which it makes its weight.

    Args:
        linear: The float linear, rounded to nearest.
        bits: Of an integer.
        group_size: Input channels to a group; the last may have fewer.
        shuffled: Whether groups are of any input channels, as after activation order.
    """

    def __init__(self, linear: nn.Linear, bits: int = 3, group_size: int = 8, shuffled=False):
        super().__init__()
        weight = linear.weight.detach()
        self.out_features, self.in_features = weight.shape
        groups = torch.arange(self.in_features) // group_size
        if shuffled:
            groups = groups[torch.randperm(len(groups), generator=torch.Generator().manual_seed(0))]
        low, high = (
            torch.stack([f(weight[:, groups == g], 1).values for g in range(int(groups.max()) + 1)])
            for f in (torch.min, torch.max)
        )
        scales = (high - low).clamp(min=1e-6) / (2**bits - 1)
        zeros = (-low / scales).round()
        integers = (weight.T / scales[groups] + zeros[groups]).round().clamp(0, 2**bits - 1)
        self.register_buffer("qweight", integers.int())
        self.register_buffer("qzeros", zeros.int())
        self.register_buffer("scales", scales)
        self.register_buffer("g_idx", groups.int())
        self.bias = linear.bias

    def dense(self) -> Tensor:
        """The weight, (in_features, out_features)."""
        return self.scales[self.g_idx] * (self.qweight - self.qzeros[self.g_idx])

    def forward(self, inputs: Tensor) -> Tensor:
        output = inputs @ self.dense().to(inputs)
        return output if self.bias is None else output + self.bias


def grouped(model: nn.Module, kind: type[nn.Module] = GroupedLinear, **settings) -> nn.Module:
    """A copy of a model of language whose blocks have such linears."""
    quantized = copy.deepcopy(model)
    for name, module in list(quantized.named_modules()):
        if isinstance(module, nn.Linear) and "lm_head" not in name:
            quantized.set_submodule(name, kind(module, **settings))
    return quantized
