"""Packed linears in place of a model's own, in the formats that are known."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import BiasCompensationError
from ..vectors.lazy import LazyTensor
from .compressed import CompressedLinear
from .errors import CannotStream, no_tensor
from .packed import PackedLinear
from .stored import StoredLinear

METHODS = {"gptq": PackedLinear, "awq": PackedLinear, "compressed-tensors": CompressedLinear}


def put_packed(
    folder: Path, model: nn.Module, places: Mapping[str, LazyTensor], settings: Mapping[str, Any]
) -> None:
    """Linears as they are stored in place of the float ones; of a float checkpoint, nothing.

    Args:
        places: The checkpoint's tensors.
        settings: Its ``quantization_config``.

    Raises:
        CannotStream: its format is unknown here.
        BiasCompensationError: a tensor is missing, or has another shape than the config's.
    """
    method = settings.get("quant_method", "gptq" if "bits" in settings else None)
    if method is None:
        return
    kind = METHODS.get(method)
    if kind is None:
        raise CannotStream(folder, f"it is of {method!r}, known are {', '.join(METHODS)} and none")
    try:
        known = kind.settings_of({"quant_method": method, **settings})
    except (ValueError, ImportError) as error:
        raise CannotStream(folder, str(error)) from error
    for key in places:
        path, _, leaf = key.rpartition(".")
        if leaf == kind.INTEGERS:
            model.set_submodule(path, _packed(folder, model, path, places, kind, known))


def _packed(
    folder: Path,
    model: nn.Module,
    path: str,
    places: Mapping[str, LazyTensor],
    kind: type[StoredLinear],
    known: Any,
) -> StoredLinear:
    key = f"{path}.{kind.INTEGERS}"
    file = places[key].stored.path
    stored = {name: places[f"{path}.{name}"] for name in kind.TENSORS if f"{path}.{name}" in places}
    for name in kind.needed(known):
        if name not in stored:
            raise no_tensor(file, f"{path}.{name}")
    try:
        own = model.get_submodule(path)
    except AttributeError as error:
        raise CannotStream(folder, f"a {type(model).__name__} has no {path}") from error
    if isinstance(own, nn.Embedding):
        raise CannotStream(folder, f"{path}, an embedding, is quantized")
    try:
        packed = kind(stored, known)
    except ValueError as error:
        raise BiasCompensationError(f"{file}: {key} cannot be read: {error}.") from error
    if tuple(own.weight.shape) not in _shapes(own, packed):
        raise BiasCompensationError(
            f"{file}: {key} is that of {packed.in_features} x {packed.out_features} weights, the "
            f"config's of {tuple(own.weight.shape)}."
        )
    return packed


def _shapes(own: nn.Module, packed: StoredLinear) -> set[tuple[int, int]]:
    """The float weight's shape; transformers' Conv1D has it transposed."""
    widths = packed.out_features, packed.in_features
    return {widths if isinstance(own, nn.Linear) else widths[::-1]}
