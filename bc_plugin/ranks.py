"""Several processes with one model, each with its share of the data: torchrun's ranks.

Whoever wants them to act as one says so, ``with together()``; then all of them must come to every
function here that asks the others, in the same order. Without it each process is by itself, as in
programs that use torch.distributed for something else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import accumulate
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import BiasCompensationError

T = TypeVar("T")
VALUES = 1 << 22  # exchanged at once (32 MiB)

_together: ContextVar[bool] = ContextVar("_together", default=False)


@contextmanager
def together() -> Iterator[None]:
    """While it lasts the ranks of torch.distributed, where there are several, act as one.

    Each of them gives ``compensate``, ``record_float_logits`` and ``refine`` its own share of the
    calibration data, which may be unequal or empty, and gets what one process gets from all of it,
    in the order of the ranks, to rounding. ``torch.distributed`` is initialized before.
    """
    token = _together.set(True)
    try:
        yield
    finally:
        _together.reset(token)


def are_several() -> bool:
    """Whether this process acts as one with others."""
    initialized = dist.is_available() and dist.is_initialized()
    return _together.get() and initialized and dist.get_world_size() > 1


def is_first() -> bool:
    """Whether this process is the one that writes files."""
    return place()[0] == 0


def place() -> tuple[int, int]:
    """Which rank this process is, from 0 up, and of how many."""
    return (dist.get_rank(), dist.get_world_size()) if are_several() else (0, 1)


def part_of(count: int, turn: int = 0) -> slice:
    """This rank's part of ``count`` things that all have: contiguous, and as large as others'.

    Args:
        turn: By how many ranks the parts move on, so that odd ones do not always fall to the same.
    """
    rank, ranks = place()
    rank = (rank + turn) % ranks
    return slice(rank * count // ranks, (rank + 1) * count // ranks)


def wait_for_all() -> None:
    """Go on when every rank has come here."""
    if are_several():
        with reached():
            dist.barrier()


def gathered(value: T) -> list[T]:
    """What every rank gives, in their order; to be pickled, so nothing large, and no GPU's."""
    if not are_several():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    with reached():
        dist.all_gather_object(values, value)
    return values


def given_by_first(value: T) -> T:
    """What the first rank gives; to be pickled, as with ``gathered``."""
    if not are_several():
        return value
    given: list[Any] = [value if is_first() else None]
    with reached():
        dist.broadcast_object_list(given)
    return given[0]


def summed(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Of each tensor, which has one shape on all ranks, the sum over them, where and as it was."""
    if not are_several():
        return list(tensors)
    found: list[Tensor] = []
    while len(found) < len(tensors):
        some = _at_once(tensors[len(found) :])
        flat = torch.cat([each.detach().flatten().to(_device(), torch.float64) for each in some])
        with reached():
            dist.all_reduce(flat)
        parts = flat.split([each.numel() for each in some])
        found += [part.view(each.shape).to(each) for part, each in zip(parts, some, strict=True)]
    return found


def _at_once(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """As many of the first tensors as are exchanged together: a wait for each would add up."""
    sizes = accumulate(each.numel() for each in tensors)
    return tensors[: max(1, sum(size <= VALUES for size in sizes))]


def place_of(count: int) -> tuple[int, int]:
    """Where this rank's ``count`` items begin among those of all, and how many these are."""
    if not are_several():
        return 0, count
    counts = gathered(count)
    return sum(counts[: dist.get_rank()]), sum(counts)


def require_same(value: Any, what: str) -> None:
    """Refuse to go on with ranks that differ.

    Raises:
        BiasCompensationError: ``value`` is not the same on all; ``what`` it means, as a sentence.
    """
    if any(other != value for other in gathered(value)):
        raise BiasCompensationError(what)


def add_up(*holders: Any) -> None:
    """Make of each holder's sums those over all ranks, the same on each of them.

    Args:
        holders: As many, in the same order, on every rank. The class of each names its sums in
            ``SUMS``: attributes that are numbers, tensors, or None where there is nothing yet.
            Tensors stay on their devices.

    Raises:
        BiasCompensationError: the ranks have sums of other things.
    """
    if not are_several():
        return
    sums = [(holder, name) for holder in holders for name in holder.SUMS]
    kinds = gathered([_kind(getattr(holder, name)) for holder, name in sums])
    found = [{kind for kind in same if kind is not None} for same in zip(*kinds, strict=False)]
    if len({len(each) for each in kinds}) > 1 or any(len(same) > 1 for same in found):
        raise BiasCompensationError(
            "the ranks' calibration data does not come to the same modules in the same shapes; "
            "give each rank a share of data of one kind."
        )
    known = [(*each, kind.pop()) for each, kind in zip(sums, found, strict=True) if kind]
    totals = summed([_as_tensor(getattr(holder, name), kind) for holder, name, kind in known])
    for (holder, name, kind), total in zip(known, totals, strict=True):
        value = getattr(holder, name)
        if not isinstance(kind, tuple):
            setattr(holder, name, kind(total.item()))
        else:
            setattr(holder, name, total.to(value) if isinstance(value, Tensor) else total)


def _kind(value: Any) -> type | tuple[int, ...] | None:
    """What sums have to have in common."""
    if value is None:
        return None
    return tuple(value.shape) if isinstance(value, Tensor) else type(value)


def _as_tensor(value: Any, kind: type | tuple[int, ...]) -> Tensor:
    if value is None:
        shape = kind if isinstance(kind, tuple) else ()
        return torch.zeros(shape, dtype=torch.float64, device=_device())
    return torch.as_tensor(value, dtype=torch.float64)


@contextmanager
def reached() -> Iterator[None]:
    """What backends say of a rank that has ended, as an error of ours."""
    try:
        yield
    except RuntimeError as error:  # of all kinds, by backend
        raise BiasCompensationError(
            "another rank has ended, or did not answer in time; see what that one says. "
            f"({str(error).splitlines()[0]})"
        ) from error


def _device() -> torch.device:
    """Where the ranks exchange tensors: most backends know those of accelerators only."""
    if dist.get_backend() == "gloo" or not torch.accelerator.is_available():
        return torch.device("cpu")
    return torch.accelerator.current_accelerator()
