"""The scales that a pass gives a model, block after block, and takes back if it fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..errors import BiasCompensationError
from ..models.calls import BlockCalls
from ..models.integers import integer_weights, overwrite
from ..models.mixers import convolved_linears
from ..ranks import wait_for_all
from ..vectors.weights import forget_floats
from .covariance import input_covariances
from .messages import NO_SCALES, about_scales
from .rescaling import Rescaling
from .scales import fitted_scales


class FittedScales:
    """Scales in closed form, in the toolkit's own tensors; a context that undoes it on an error.

    Args:
        copy_to_run: Makes of a quantized block the copy that is run.
        wanted: Whether scales are to be fitted at all.

    Attributes:
        before: By linear with new ones, the toolkit's own scales, and what they were.
        left: The linears that keep their scales, since their held-out error would rise.
    """

    def __init__(self, copy_to_run: Callable[[nn.Module], nn.Module], wanted: bool) -> None:
        self.copy_to_run, self.wanted = copy_to_run, wanted
        self.before: dict[str, tuple[Tensor, Tensor]] = {}
        self.left: list[str] = []

    def __enter__(self) -> FittedScales:
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
        """Give the linears of a block the scales that are best with a bias; whether any changed.

        Args:
            name, number: Path and number of the block.
            reference, block: The float and the quantized block.
            linears: Paths within the block of those whose outputs can be compared.
            stream: What the block is called with.
            positions: Number of leading positions with a vector of their own.
            rescaling: The scales that were moved within the block.
            dtype: The type the quantized model computes in.

        Raises:
            BiasCompensationError: a linear's scales cannot be told from its integers.
        """
        if not self.wanted:
            return False
        without_vectors = convolved_linears(reference)
        linears = [path for path in linears if path not in without_vectors]
        weights = integer_weights(block, linears, self.copy_to_run, dtype)
        given = input_covariances(name, number, reference, linears, stream, positions, rescaling)
        known: dict[int, tuple[Tensor, Tensor | None]] = {}
        fitted: dict[str, Tensor] = {}
        for path, inputs in given.items():
            if id(inputs) not in known:
                known = {id(inputs): (inputs.fitted(), inputs.apart())}
            target = _target(reference.get_submodule(path), rescaling.inputs.get(path))
            device = weights[path].stored.device
            scales = fitted_scales(target.to(device), weights[path], *known[id(inputs)])
            if scales is None:
                self.left.append(f"{name}.{path}")
                continue
            stored = weights[path].stored
            self.before[f"{name}.{path}"] = stored, stored.clone()
            fitted[path] = scales
        wait_for_all()  # ranks may share the tensors, and some still read them
        for path, scales in fitted.items():
            weights[path].write(scales)
        wait_for_all()
        return bool(fitted)

    def conclude(self, model: nn.Module) -> set[str]:
        """The linears of ``model`` with new scales; those that keep theirs are told.

        Raises:
            BiasCompensationError: there was no linear whose scales could be fitted.
        """
        if self.left:
            tqdm.write(about_scales(self.left))
        elif self.wanted and not self.before:
            raise BiasCompensationError(NO_SCALES)
        if self.before:
            forget_floats(model)
        return set(self.before)

    def undo(self, inside: str = "") -> None:
        """Set the scales back, of one block or of all."""
        for name in [name for name in self.before if name.startswith(inside)]:
            overwrite(*self.before.pop(name))


def _target(linear: nn.Module, moved: Tensor | None) -> Tensor:
    """The float weight, (out_features, in_features), for inputs divided by ``moved``."""
    weight = linear.weight.detach()
    weight = weight if isinstance(linear, nn.Linear) else weight.T  # transformers' Conv1D
    return weight if moved is None else weight * moved.to(weight.device)
