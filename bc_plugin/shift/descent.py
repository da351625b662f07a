"""Integers and scales in turn, once a bias will take out the mean.

GPTQ rounds each column once, with scales chosen before. Its result is a good place to start from:
each integer is set to the best there is with all others as they are (coordinate descent: QuantEase,
Behdin et al., arXiv 2309.01885), then the scales to the best for these integers, and so on. Each
step lowers the same error, ``(w - U s) C (w - U s)^T``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..models.integers import IntegerWeight
from ..models.words import PackedIntegers
from .scales import change_of_error, least_squares

TURNS = 4
DAMPING = 0.01  # of the mean of the diagonal, towards the float weight
COLUMNS = 128  # whose changes go into the gradient of the others at once


def integers_and_scales(
    weight: Tensor,
    integers: Tensor,
    scales: Tensor,
    low: Tensor,
    high: Tensor,
    groups: Tensor,
    covariance: Tensor,
    stored: torch.dtype,
    turns: int = TURNS,
) -> tuple[Tensor, Tensor]:
    """What GPTQ found, made better.

    Args:
        weight: The float linear's, (out_features, in_features).
        integers: Less their zero points, (out_features, in_features).
        scales: (out_features, groups).
        low, high: The least and the largest that ``integers`` can be, (out_features, groups).
        groups: The group of each input channel, int64 (in_features,).
        covariance: Of the inputs, (in_features, in_features).
        stored: The type that scales are stored in.
        turns: How often both are gone through.

    Returns:
        Integers and scales of the same shapes, float32; a channel keeps the scales it has where the
        best are not positive, or too large to be stored.
    """
    weight, covariance = weight.float(), covariance.float().clone()
    covariance.diagonal().add_(DAMPING * covariance.diagonal().mean())
    wide = covariance.double()
    integers, scales = integers.float(), scales.to(stored).float()
    for _ in range(turns):
        integers = _descended(weight, integers, scales, low, high, groups, covariance)
        current = IntegerWeight(integers, groups, scales)
        best = least_squares(weight, current, wide).to(stored).float()
        usable = (best.isfinite() & (best > 0)).all(1, keepdim=True)
        scales = torch.where(usable, best, scales)
    return integers, scales


def chosen_again(
    weight: Tensor,
    quantized: IntegerWeight,
    packed: PackedIntegers,
    covariance: Tensor,
    apart: Tensor | None,
) -> tuple[Tensor, Tensor] | None:
    """Better integers and scales for a linear that is quantized already.

    Args:
        weight: What the float linear has in this place, (out_features, in_features).
        packed: Where its integers are kept.
        covariance: Of the inputs to fit to, float64 (in_features, in_features).
        apart: Of those held out; None where there are none.

    Returns:
        As ``integers_and_scales`` does, or None if they are no better on what was held out.
    """
    integers, scales = integers_and_scales(
        weight,
        quantized.integers,
        quantized.stored,
        packed.low,
        packed.high,
        quantized.groups,
        covariance.to(weight.device),
        quantized.stored.dtype,
    )
    scales = scales.double()
    if torch.equal(integers, quantized.integers.float()) and torch.equal(scales, quantized.scales):
        return None
    if apart is None:
        return integers, scales
    apart = apart.to(weight.device)
    if change_of_error(weight, quantized, apart, scales, integers) >= 0:
        return None
    return integers, scales


def _descended(
    weight: Tensor,
    integers: Tensor,
    scales: Tensor,
    low: Tensor,
    high: Tensor,
    groups: Tensor,
    covariance: Tensor,
) -> Tensor:
    """Each integer set to the best there is, input channel after input channel."""
    # Input channels first, so that what belongs to one lies together.
    scales, low, high = (each.T.float().contiguous() for each in (scales, low, high))
    integers = integers.T.contiguous()
    gradient = covariance @ (integers * scales[groups] - weight.T)
    diagonal, places = covariance.diagonal().tolist(), groups.tolist()
    for start in range(0, len(integers), COLUMNS):
        stop = min(start + COLUMNS, len(integers))
        changes = torch.zeros_like(gradient[start:stop])
        for place, column in enumerate(range(start, stop)):
            if diagonal[column] <= 0:
                continue
            group, before = places[column], integers[column]
            slope = gradient[column] + covariance[column, start:column] @ changes[:place]
            step = slope / (diagonal[column] * scales[group])
            after = (before - step).round_().clamp_(low[group], high[group])
            # A scale of zero says nothing of its integers.
            after = torch.where(scales[group] > 0, after, before)
            changes[place] = (after - before) * scales[group]
            integers[column] = after
        gradient[stop:] += covariance[stop:, start:stop] @ changes
    return integers.T.contiguous()
