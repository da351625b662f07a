"""Numbers that tell tensors apart, computed where the tensor is: exact ones, and rounded ones.

A multilinear hash (Carter and Wegman, 1979) modulo 2**64: the sum of all words, each times an odd
number of its own. Another value in a single word always gives another number, and so do, but for
chance, more of them. It is fast enough (2.9 GB a second on two cores) to read all of a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional

WORD, ROW, ROWS = 8, 1 << 14, 16  # bytes of a word, words of a row, rows at once (2 MiB)
_MULTIPLIER = -7046029254386353131  # 2**64 over the golden ratio, as a signed number


PART = ROWS * ROW * WORD


def fingerprint(tensor: Tensor) -> int:
    """The same for the same bytes on every device; shape and type are not part of it."""
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    return fingerprint_of_parts(data.split(PART), data.device)


def fingerprint_of_parts(parts: Iterable[Tensor], device: torch.device | str = "cpu") -> int:
    """The ``fingerprint`` of what comes in parts.

    Args:
        parts: uint8, on the device; ``PART`` bytes each, but for the last.
        device: Where they are.
    """
    columns = _odd_numbers(0, ROW, device)
    total = torch.zeros((), dtype=torch.int64, device=device)
    for number, part in enumerate(parts):
        padded = functional.pad(part, (0, -len(part) % (ROW * WORD)))  # a copy, so it is aligned
        words = padded.view(torch.int64).view(-1, ROW)
        rows = _odd_numbers(ROW + number * ROWS, len(words), device)
        total += ((words * columns).sum(-1) * rows).sum()
    return int(total)


SIGNS = 4
# Casting a weight to bfloat16 moves a projection by 0.0011 of the tensor's norm (its values are
# rounded by up to 2**-9, evenly); a projection of n tensors, by sqrt(n) times that.
TOLERANCE = 6 * 0.0011


def projections(tensors: Iterable[Tensor]) -> list[float]:
    """Random projections of floating tensors, which casting them to another type hardly moves.

    Each tensor counts alike, by its direction and by the logarithm of its norm (Johnson and
    Lindenstrauss, 1984: another direction is seen in a few random projections of it).

    Returns:
        ``SIGNS`` numbers; ``alike`` compares them.
    """
    total = torch.zeros(SIGNS, dtype=torch.float64)
    for number, tensor in enumerate(tensors):
        values = tensor.detach().reshape(-1).float()
        norm = float(values.norm())
        if norm == 0:
            continue
        bits = _odd_numbers(number << 32, len(values) + 1, values.device)
        signs = [(bits >> (8 + sign) & 1) * 2.0 - 1 for sign in range(SIGNS)]
        found = torch.stack([values @ sign[1:].to(values) / norm for sign in signs]).double().cpu()
        own = torch.stack([sign[0] for sign in signs]).double().cpu()
        total += found + own * math.log(norm)
    return total.tolist()


def alike(first: Iterable[float], second: Iterable[float], tensors: int) -> bool:
    """Whether ``projections`` of ``tensors`` tensors are the same but for casting."""
    limit = TOLERANCE * math.sqrt(tensors)
    return all(abs(a - b) <= limit for a, b in zip(first, second, strict=True))


def _odd_numbers(first: int, count: int, device: torch.device) -> Tensor:
    """int64 (count,), scattered over all of its values."""
    numbers = torch.arange(first, first + count, device=device) * _MULTIPLIER
    numbers = (numbers ^ (numbers >> 29)) * _MULTIPLIER
    return (numbers ^ (numbers >> 32)) | 1
