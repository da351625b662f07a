"""A linear that is run from what a file has of it, some output channels at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..vectors.lazy import LazyTensor


class StoredLinear(nn.Module):
    """Tensors with the names, shapes and types of the file, so their digest is any loader's.

    Args:
        stored: What the file has of it, by name; on the meta device until it is filled in.

    Attributes:
        INTEGERS: Name of the tensor that tells such a linear.
        TENSORS: Names of all that there may be.
    """

    INTEGERS: ClassVar[str]
    TENSORS: ClassVar[tuple[str, ...]]
    in_features: int
    out_features: int

    def __init__(self, stored: Mapping[str, LazyTensor]) -> None:
        super().__init__()
        for name in self.TENSORS:
            self.register_buffer(name, stored[name].empty() if name in stored else None)

    def forward(self, inputs: Tensor) -> Tensor:
        """``inputs``, (..., in_features), times the weight, plus the bias; in the inputs' type."""
        output = inputs.new_empty(*inputs.shape[:-1], self.out_features)
        for channels, weight in self._weights(inputs.dtype):
            output[..., channels] = functional.linear(inputs, weight)
        return output if self.bias is None else output.add_(self.bias.to(inputs))

    def _weights(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Some channels, and their weight, (channels, in_features)."""
        raise NotImplementedError
