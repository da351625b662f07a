"""The scales and integers that a pass gives a model, block by block, and takes back if it fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..errors import BiasCompensationError
from ..models.calls import BlockCalls
from ..models.integers import IntegerWeight, integer_weights, overwrite
from ..models.mixers import convolved_linears
from ..models.words import PackedIntegers, mark_chosen, packed_integers
from ..ranks import wait_for_all
from ..vectors.weights import forget_floats, forget_weights
from .covariance import input_covariances
from .descent import chosen_again
from .messages import NOTHING_TO_FIT, about_left
from .rescaling import Rescaling
from .scales import fitted_scales


@dataclass(frozen=True)
class _Found:
    """What a linear is to be given: scales, and integers where those were chosen, too."""

    weight: IntegerWeight
    scales: Tensor
    packed: PackedIntegers | None = None
    integers: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """The toolkit's own, which change."""
        return [self.weight.stored] + ([] if self.packed is None else [self.packed.words])

    def write(self) -> None:
        self.weight.write(self.scales)
        if self.packed is not None:
            self.packed.write(self.integers)


class FittedWeights:
    """Scales, and integers, in the toolkit's own tensors; a context that undoes it on an error.

    Args:
        copy_to_run: Makes of a quantized block the copy that is run.
        scales: Whether scales are to be fitted, in closed form.
        integers: Whether integers are to be chosen again, and scales with them.

    Attributes:
        before: By linear with new ones, the toolkit's own tensors, and what they were.
        left: The linears that stay as they are, since their held-out error would rise.
    """

    def __init__(
        self, copy_to_run: Callable[[nn.Module], nn.Module], scales: bool, integers: bool
    ) -> None:
        self.copy_to_run, self.integers = copy_to_run, integers
        self.wanted = scales or integers
        self.before: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self.left: list[str] = []

    def __enter__(self) -> FittedWeights:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        if kind is not None:
            self.undo()

    def fit(
        self,
        name: str,
        number: int,
        reference: nn.Module,
        block: nn.Module,
        linears: Sequence[str],
        stream: Sequence[BlockCalls],
        positions: int,
        rescaling: Rescaling,
        dtype: torch.dtype,
    ) -> bool:
        """Give the linears of a block what is best with a bias; whether any changed.

        Args:
            name, number: Path and number of the block.
            reference, block: The float and the quantized block.
            linears: Paths within the block of those whose outputs can be compared.
            stream: What the block is called with.
            positions: Number of leading positions with a vector of their own.
            rescaling: The scales that were moved within the block.
            dtype: The type the quantized model computes in.

        Raises:
            BiasCompensationError: a linear's scales cannot be told from its integers, or these are
                packed in a way that is not known.
        """
        if not self.wanted:
            return False
        without_vectors = convolved_linears(reference)
        linears = [path for path in linears if path not in without_vectors]
        weights = integer_weights(block, linears, self.copy_to_run, dtype)
        packed = {path: self._packed(f"{name}.{path}", block, path, weights) for path in weights}
        given = input_covariances(
            name, number, reference, linears, stream, positions, rescaling, self.integers
        )
        known: dict[int, tuple[Tensor, Tensor | None]] = {}
        fitted: dict[str, _Found] = {}
        for path, inputs in given.items():
            if id(inputs) not in known:
                known = {id(inputs): (inputs.with_leading(), inputs.apart())}
            target = _target(reference.get_submodule(path), rescaling.inputs.get(path))
            target = target.to(weights[path].stored.device)
            found = _best(target, weights[path], packed[path], *known[id(inputs)])
            if found is None:
                self.left.append(f"{name}.{path}")
                continue
            self.before[f"{name}.{path}"] = [(own, own.clone()) for own in found.tensors()]
            fitted[path] = found
        wait_for_all()  # ranks may share the tensors, and some still read them
        for found in fitted.values():
            found.write()
        wait_for_all()
        return bool(fitted)

    def _packed(
        self, name: str, block: nn.Module, path: str, weights: dict[str, IntegerWeight]
    ) -> PackedIntegers | None:
        if not self.integers:
            return None
        return packed_integers(name, block.get_submodule(path), weights[path])

    def conclude(self, model: nn.Module) -> set[str]:
        """The linears of ``model`` that have changed; those that stay as they are are told.

        Raises:
            BiasCompensationError: there was no linear that could be fitted.
        """
        if self.left:
            tqdm.write(about_left(self.left, "integers and scales" if self.integers else "scales"))
        elif self.wanted and not self.before:
            raise BiasCompensationError(NOTHING_TO_FIT)
        if self.before and self.integers:
            forget_weights(model)
            mark_chosen(model, self.before)
        elif self.before:
            forget_floats(model)
        return set(self.before)

    def undo(self, inside: str = "") -> None:
        """Put back what there was, in one block or in all."""
        for name in [name for name in self.before if name.startswith(inside)]:
            for own, before in self.before.pop(name):
                overwrite(own, before)


def _best(
    target: Tensor,
    weight: IntegerWeight,
    packed: PackedIntegers | None,
    covariance: Tensor,
    apart: Tensor | None,
) -> _Found | None:
    """What a linear is best given; None if that is what it has."""
    if packed is None:
        scales = fitted_scales(target, weight, covariance, apart)
        return None if scales is None else _Found(weight, scales)
    found = chosen_again(target, weight, packed, covariance, apart)
    return None if found is None else _Found(weight, found[1], packed, found[0])


def _target(linear: nn.Module, moved: Tensor | None) -> Tensor:
    """The float weight, (out_features, in_features), for inputs divided by ``moved``."""
    weight = linear.weight.detach()
    weight = weight if isinstance(linear, nn.Linear) else weight.T  # transformers' Conv1D
    return weight if moved is None else weight * moved.to(weight.device)
