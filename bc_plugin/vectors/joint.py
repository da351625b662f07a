"""Weights that were quantized jointly with their linears' vectors, and are worth little without."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from torch import nn

from ..errors import BiasCompensationError
from ..marks import mark, mark_of


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
