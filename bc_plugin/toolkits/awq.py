"""Scales that AWQ moves, recorded while a toolkit applies them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..marks import mark_of
from ..shift.rescaling import Rescaling
from .patch import argument


def record(block: nn.Module, scales: Iterable[tuple[Any, ...]]) -> None:
    """Note scales about to be applied to a block that a compensated run has marked."""
    rescaling = mark_of(block, Rescaling)
    if rescaling is not None:
        rescaling.add(block, scales)


def scales_are_applied(wrapped, instance, args, kwargs):
    """Wrapper for ``apply_scale(module, scales_list, ...)``, as all AWQ toolkits have it."""
    record(argument("module", 0, args, kwargs), argument("scales_list", 1, args, kwargs))
    return wrapped(*args, **kwargs)
