"""Weights that were quantized jointly with their linears' vectors, and are worth little without."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import BiasCompensationError
from ..marks import mark, mark_of
from ..names import KEY
from .attach import attached_to
from .entry import FORMAT_VERSION, entry_of
from .short_names import collapse, expand

WITHOUT = "without_vectors"


@dataclass(frozen=True)
class JointWeights:
    """What a model is marked with while the vectors are not in place.

    Attributes:
        linears: Paths of the linears whose weights count on vectors.
    """

    linears: frozenset[str]


def mark_joint(model: nn.Module, linears: Iterable[str]) -> None:
    """Remember that the weights of these linears count on vectors."""
    mark(model, JointWeights(frozenset(linears)))


def joint_linears(model: nn.Module) -> frozenset[str]:
    """The linears whose weights count on vectors; none for weights that were quantized alone."""
    found = mark_of(model, JointWeights)
    return frozenset() if found is None else found.linears


def require_linears(joint: Collection[str], found: Collection[str], why: str) -> None:
    """Refuse to leave joint weights without their vectors.

    Args:
        joint: As ``joint_linears`` gives them.
        found: Those that have vectors, or can have them.
        why: What to do where some have none.
    """
    missing = sorted(set(joint) - set(found))
    if missing:
        raise BiasCompensationError(
            f"{len(missing)} of {len(joint)} linears that were quantized jointly with their "
            f"vectors would be left without, the first is {missing[0]}; such weights are worth "
            f"little by themselves; {why}"
        )


def entry_to_save(model: nn.Module) -> dict[str, Any] | None:
    """What the quantization config of ``model`` has to say of it when it is saved.

    Returns:
        The entry of the vectors in place; where there are none, one that names the linears whose
        weights count on them; None for a model without either.
    """
    attached = attached_to(model)
    if attached is not None:
        return entry_of(attached)
    linears = collapse(sorted(joint_linears(model)))
    if not linears:
        return None
    return {"format_version": FORMAT_VERSION, "joint": True, WITHOUT: list(linears)}


def saved_without(entry: Mapping[str, Any] | None) -> list[str]:
    """The linears, of an entry that was written without the vectors they count on; else none."""
    shorts = entry.get(WITHOUT) if isinstance(entry, Mapping) else None
    try:
        return [name for short in shorts or () for name in expand(short)]
    except (TypeError, ValueError) as error:
        raise BiasCompensationError(
            f"the {KEY} entry is damaged: {WITHOUT!r} is {shorts!r}, expected names of linears "
            f"({error}); take it from the original checkpoint."
        ) from error


def note_saved_without(entry: Mapping[str, Any] | None, model: nn.Module) -> None:
    """Warn of a checkpoint just read whose joint weights have no vectors, and mark the model."""
    linears = saved_without(entry)
    if linears:
        mark_joint(model, linears)
        warnings.warn(
            f"the weights of {len(linears)} linears of this checkpoint, the first is {linears[0]}, "
            "were quantized jointly with vectors that it was saved without, and are worth little "
            "by themselves. Attach vectors kept elsewhere (bc_plugin.Compensation.load(folder)"
            ".attach(model)), or compute them again with bc_plugin.compensate or `bc-plugin "
            "compensate`.",
            stacklevel=2,
        )
