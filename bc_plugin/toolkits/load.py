"""From a checkpoint's files to a compensated model, the same for every loader."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from ..errors import BiasCompensationError
from ..marks import mark, unmark
from ..names import KEY
from ..vectors.checkpoint import (
    checkpoint_files,
    naming,
    read_vectors,
    require_bound,
)
from ..vectors.compensation import Compensation
from ..vectors.joint import note_saved_without, saved_without
from ..vectors.settings import CONFIG, read_json, read_settings
from ..vectors.weights import keep_weights

R = TypeVar("R")

# The files of the checkpoint that a loader is reading, where it tells of them.
files_read: ContextVar[tuple[Path, ...] | None] = ContextVar("files_read", default=None)

_looked_at: ContextVar[tuple[Path, Compensation | None] | None] = ContextVar(
    "_looked_at", default=None
)
_keeps_weights: ContextVar[bool] = ContextVar("_keeps_weights", default=False)


@contextmanager
def keeping_weights() -> Iterator[None]:
    """While it lasts, models that are loaded are known by their weights as the files have them."""
    token = _keeps_weights.set(True)
    try:
        yield
    finally:
        _keeps_weights.reset(token)


def read_compensation(
    entry: Mapping[str, Any] | None, files: Iterable[str | Path], bound: bool = True
) -> Compensation | None:
    """The compensation that a checkpoint's settings announce and its files hold.

    Args:
        files: Those that the loader reads, and no others.
        bound: Whether all of them are compared with what they were, not the vectors alone.

    Returns:
        None for a checkpoint without vectors.

    Raises:
        BiasCompensationError: only one of the two is there, or they do not belong together, or
            to the weights in the files.
    """
    files = list(files)
    folder = Path(files[0]).parent if files else "the checkpoint"
    if entry is not None and not saved_without(entry):
        vectors = read_vectors(files)
        with naming(files):
            compensation = Compensation.from_entry(entry, vectors)
        if bound:
            require_bound(entry, files)
        return compensation
    vectors = _vectors_if_readable(files)
    if vectors:
        raise BiasCompensationError(
            f"{folder} holds {len(vectors)} compensation tensors, the first is "
            f"{next(iter(vectors))}.{KEY}, but its quantization config has no {KEY} entry; "
            "restore the config it was saved with, or load it without bc_plugin.enable()."
        )
    return None


@contextmanager
def reading_weights(checkpoint: str | Path) -> Iterator[None]:
    """While it lasts a loader looks for a checkpoint's weights; where it is ours, errors say so.

    Args:
        checkpoint: Its folder, or a name on the hub, which has none.
    """
    try:
        yield
    except Exception as error:
        if not Path(checkpoint).is_dir() or read_settings(checkpoint).get(KEY) is None:
            raise
        names = ", ".join(sorted(path.name for path in Path(checkpoint).glob("*.safetensors*")))
        raise BiasCompensationError(
            f"the weights in {checkpoint} ({names}) cannot be found or read: {error}; download or "
            "save the checkpoint again."
        ) from error


@contextmanager
def reading_config(checkpoint: str | Path) -> Iterator[None]:
    """While it lasts a loader reads a checkpoint's config; where it is ours, errors say so.

    Args:
        checkpoint: Its folder, or a name on the hub, which has none.
    """
    try:
        yield
    except Exception as error:
        path = Path(checkpoint, CONFIG)
        if not path.is_file() or not _vectors_if_readable([path.parent]):
            raise
        if isinstance(read_json(path), dict):
            raise
        raise BiasCompensationError(
            f"{path} holds no JSON object; download or save the checkpoint again."
        ) from error


def _vectors_if_readable(paths: Iterable[str | Path]) -> dict[str, Tensor]:
    """The vectors of a checkpoint that may be none of ours: what is wrong with it others will say.

    Args:
        paths: Its folder, or its files.
    """
    try:  # only safetensors files can be looked into without reading all of them
        files = [file for path in paths for file in checkpoint_files(path)]
        return read_vectors(file for file in files if file.suffix == ".safetensors")
    except BiasCompensationError:
        return {}


def load_if_any(checkpoint: str | Path) -> Compensation | None:
    """The compensation of a checkpoint, None when it has none.

    Args:
        checkpoint: Its folder, or what its loader reads of it: a file, or the index of several.
    """
    return read_compensation(_entry_in(checkpoint), checkpoint_files(checkpoint))


def _entry_in(checkpoint: str | Path) -> Mapping[str, Any] | None:
    path = Path(checkpoint)
    return read_settings(path if path.is_dir() else path.parent).get(KEY)


def look_at(checkpoint: str | Path) -> None:
    """Check what can be checked of a checkpoint before its loader stumbles over it.

    Args:
        checkpoint: As ``load_if_any`` has it.
    """
    path = Path(checkpoint)
    _looked_at.set((path, load_if_any(path)))


def hold_for(model: nn.Module, checkpoint: str | Path) -> None:
    """Check the compensation of a checkpoint just read, and keep it until ``attach_held``.

    Between the two, kernels are initialised, which may repack the weights the digest is taken of.

    Args:
        checkpoint: As ``load_if_any`` has it.
    """
    note_saved_without(_entry_in(checkpoint), model)
    seen = _looked_at.get()
    _looked_at.set(None)  # files may be others by the next time
    known = seen is not None and seen[0] == Path(checkpoint)
    compensation = seen[1] if known else load_if_any(checkpoint)
    if compensation is not None:
        compensation.check(model)
        mark(model, compensation)


def attach_held(model: nn.Module) -> bool:
    """Attach what ``hold_for`` kept; whether there was anything."""
    compensation = unmark(model, Compensation)
    if compensation is not None:
        compensation.attach_unchecked(model)
    return compensation is not None


def attach_around(
    initialise: Callable[[], R], model: nn.Module, compensation: Compensation | None
) -> R:
    """Attach around the initialisation of kernels, for a toolkit where one function does it.

    Args:
        initialise: The toolkit's own call; returns what is returned.
        compensation: None where there is none.
    """
    if compensation is not None:
        compensation.check(model)
    if _keeps_weights.get():
        keep_weights(model)
    result = initialise()
    if compensation is not None:
        compensation.attach_unchecked(model)
    return result


def fit_to(compensation: Compensation, model: nn.Module) -> Compensation:
    """The same vectors under the names of ``model``.

    It may be a base model without a head where the other had one, or the other way round.
    """
    prefix = getattr(model, "base_model_prefix", "") + "."
    names = {name for name, _ in model.named_modules()}
    blocks = compensation.blocks
    if names.issuperset(blocks) or prefix == ".":
        return compensation
    if all(path.startswith(prefix) for path in blocks):
        return compensation.renamed(lambda name: name.removeprefix(prefix))
    if names.issuperset(prefix + path for path in blocks):
        return compensation.renamed(lambda name: prefix + name)
    return compensation
