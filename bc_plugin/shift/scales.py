"""Group scales in closed form, once a bias will take out the mean.

With its integers fixed, an output channel is linear in its scales, one unknown per group. With the
best bias in place its error is ``(w - U s) C (w - U s)^T``: U the integers less their zero points,
one column per group, and C the covariance of the inputs. Where that is least, ``A s = b`` with
``A = U^T C U`` and ``b = U^T C w``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..models.integers import IntegerWeight

RIDGE = 0.01  # of the diagonal, towards the scales there are
VALUES = 1 << 23  # float64 at once (64 MiB)


def fitted_scales(
    weight: Tensor,
    quantized: IntegerWeight,
    covariance: Tensor,
    apart: Tensor | None,
    ridge: float = RIDGE,
) -> Tensor | None:
    """The best scales of a linear, as they can be stored.

    Args:
        weight: What the float linear has in this place, (out_features, in_features).
        covariance: Of the inputs to fit to, float64 (in_features, in_features).
        apart: Of those held out; None where there are none.
        ridge: A share of the diagonal.

    Returns:
        float64 (out_features, groups), or None if they are no better on what was held out. A
        channel keeps the scales it has where the best are not positive, or too large to be stored.
    """
    before = quantized.scales
    scales = quantized.rounded(least_squares(weight, quantized, covariance, ridge))
    usable = (scales.isfinite() & ((scales > 0) | (before <= 0))).all(1, keepdim=True)
    scales = torch.where(usable, scales, before)
    if bool((scales == before).all()):
        return None
    if apart is not None and change_of_error(weight, quantized, apart, scales) >= 0:
        return None
    return scales


def least_squares(
    weight: Tensor, quantized: IntegerWeight, covariance: Tensor, ridge: float = RIDGE
) -> Tensor:
    """The solution, as ``fitted_scales`` has it, before it is rounded."""
    slots, filled = _slots(quantized.groups, quantized.stored.shape[1])
    if not torch.equal(slots, torch.arange(len(slots), device=slots.device)):
        covariance = covariance[slots][:, slots]
    count = len(slots) // quantized.stored.shape[1]
    return torch.cat(
        [
            _solved(
                (quantized.integers[rows][:, slots] * filled).double(),
                weight[rows].to(covariance)[:, slots] * filled,
                covariance,
                quantized.stored[rows].double(),
                count,
                ridge,
            )
            for rows in _rows(len(weight), len(slots), quantized.stored.shape[1])
        ]
    )


def _slots(groups: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Input channels, group after group, each filled up to the largest with channel 0.

    Returns:
        int64 (count * largest,), and which of them are no filling.
    """
    sizes = torch.bincount(groups, minlength=count)
    order = groups.argsort(stable=True)
    place = (
        torch.arange(len(groups), device=groups.device) - (sizes.cumsum(0) - sizes)[groups[order]]
    )
    largest = int(sizes.max())
    slots = groups.new_zeros(count * largest)
    filled = torch.zeros_like(slots, dtype=torch.bool)
    where = groups[order] * largest + place
    slots[where], filled[where] = order, True
    return slots, filled


def _rows(channels: int, inputs: int, groups: int) -> Iterator[slice]:
    step = max(1, VALUES // max(inputs, groups * groups))
    for start in range(0, channels, step):
        yield slice(start, start + step)


def _solved(
    integers: Tensor,
    weight: Tensor,
    covariance: Tensor,
    before: Tensor,
    size: int,
    ridge: float,
) -> Tensor:
    """Scales of some channels, (channels, groups), of inputs in groups of ``size``."""
    channels, groups = before.shape
    by_group = integers.view(channels, groups, size)
    normal = integers.new_empty(channels, groups, groups)
    for group in range(groups):  # A is symmetric: half of it will do
        rest = slice(group * size, None)
        product = by_group[:, group] @ covariance[rest][:size, rest]
        column = (product.view(channels, -1, size) * by_group[:, group:]).sum(-1)
        normal[:, group, group:] = normal[:, group:, group] = column
    target = ((weight @ covariance).view(by_group.shape) * by_group).sum(-1)
    diagonal = normal.diagonal(dim1=1, dim2=2)
    held = ridge * diagonal
    target += held * before
    diagonal += held
    # A group of nothing but zeros, or of inputs that never vary, says nothing of its scale.
    silent = diagonal <= 0
    target[silent] = before[silent]
    diagonal[silent] = 1.0
    factor, failed = torch.linalg.cholesky_ex(normal)
    scales = torch.cholesky_solve(target[..., None], factor).squeeze(-1)
    return scales.masked_fill(failed[:, None] > 0, torch.nan)


def change_of_error(
    weight: Tensor,
    quantized: IntegerWeight,
    covariance: Tensor,
    scales: Tensor,
    integers: Tensor | None = None,
) -> float:
    """How much the error of a linear, summed over its channels, rises with other scales.

    Args:
        integers: Other ones, less their zero points; None for those there are.
    """
    total = 0.0
    before, groups = quantized.scales, quantized.groups
    after = quantized.integers if integers is None else integers
    for rows in _rows(len(weight), len(groups), before.shape[1]):
        now = quantized.integers[rows] * before[rows][:, groups]
        change = now - after[rows] * scales[rows].to(now)[:, groups]
        twice = 2 * (weight[rows].to(now) - now) + change
        total += ((change @ covariance) * twice).sum().item()
    return total
