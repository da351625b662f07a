"""What stands in the place of packed linears, made of each when it is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..models.packed import LEAVES, channel_parts
from ..vectors.lazy import LazyTensor


def remade(
    tensors: Mapping[str, LazyTensor],
    name: str,
    settings: Mapping[str, Any],
    make: Callable[[Mapping[str, Tensor], str, Mapping[str, Any]], Tensor],
    dtype: torch.dtype,
    shape: tuple[int, int],
    dim: int,
) -> LazyTensor:
    """A tensor that is made of a packed linear, a few output channels at a time.

    Args:
        tensors, name, settings: As ``channel_parts`` has them; what becomes of them later makes no
            difference.
        make: From tensors, name and settings, what some channels become.
        dtype, shape: Of all of them.
        dim: Where the channels are in it.
    """
    keys = [f"{name}.{leaf}" for leaf in LEAVES if f"{name}.{leaf}" in tensors]
    stored, settings = {key: tensors[key] for key in keys}, dict(settings)

    def read() -> Tensor:
        whole = torch.empty(shape, dtype=dtype)
        values = {key: tensor.read() for key, tensor in stored.items()}
        for channels, part in channel_parts(values, name, settings):
            made = make(part, name, settings)
            whole.narrow(dim, channels.start, made.shape[dim]).copy_(made)
        return whole

    return LazyTensor(dtype, torch.Size(shape), read)
