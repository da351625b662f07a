"""Linears of GPTQ and AWQ checkpoints as they are stored, run without a toolkit's kernel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from ..models.packed import LEAVES, channel_parts, integers_of, packed_widths

TENSORS = (*LEAVES, "bias")
IT = "it"  # a linear of a checkpoint that has no other


class PackedLinear(nn.Module):
    """Integers, zero points and scales, of which it makes its weight, some channels at a time.

    Tensors have the names, shapes and types of the file, so their digest is that of any loader.

    Args:
        tensors: By their names; on the meta device they are filled later.
        settings: The checkpoint's ``quantization_config``, of GPTQ or AWQ.
    """

    def __init__(self, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> None:
        super().__init__()
        self.settings = settings
        for name in TENSORS:
            self.register_buffer(name, tensors.get(name))
        self.in_features, self.out_features = packed_widths(self._checkpoint(), IT, settings)

    def _checkpoint(self) -> dict[str, Tensor]:
        found = {f"{IT}.{name}": getattr(self, name) for name in LEAVES}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def forward(self, inputs: Tensor) -> Tensor:
        """``inputs``, (..., in_features), times the weight, plus the bias; in the inputs' type."""
        output = inputs.new_empty(*inputs.shape[:-1], self.out_features)
        for channels, part in channel_parts(self._checkpoint(), IT, self.settings):
            output[..., channels] = functional.linear(inputs, self._weight(part).to(inputs))
        return output if self.bias is None else output.add_(self.bias.to(inputs))

    def _weight(self, part: Mapping[str, Tensor]) -> Tensor:
        """Of some channels, (channels, in_features), in the scales' type, as kernels make it."""
        integers, zeros, groups = integers_of(part, IT, self.settings)
        weight = part[f"{IT}.scales"][groups] * (integers - zeros[groups])
        return weight.T.contiguous()  # CPUs multiply half precision ten times faster so
