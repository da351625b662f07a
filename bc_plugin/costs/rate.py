"""How fast matrices are multiplied here."""

from __future__ import annotations

import time

import torch

from ..models.modules import fastest_device

SMALLEST, LARGEST, SECONDS = 128, 8192, 0.5


def product_rate(dtype: torch.dtype) -> float:
    """Operations per second of a product of two matrices, on the accelerator if there is one.

    Matrices grow until one product takes half a second or so: processors that lack a type are
    hundreds of times slower in it, and an accelerator needs large ones to be busy.
    """
    device = fastest_device()
    size, best = SMALLEST, 0.0
    while size <= LARGEST:
        seconds = _seconds(torch.randn(size, size, device=device).to(dtype))
        best = max(best, 2 * size**3 / seconds)
        if 8 * seconds > SECONDS:  # the next one has eight times as much to do
            break
        size *= 2
    return best


def _seconds(matrix: torch.Tensor) -> float:
    """Of one product, the second of two; the first may have to set up things."""
    for _ in range(2):
        start = time.perf_counter()
        matrix @ matrix
        if matrix.device.type != "cpu":
            torch.accelerator.synchronize()
    return time.perf_counter() - start
