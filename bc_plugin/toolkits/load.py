"""From a checkpoint's files to a compensated model, the same for every loader."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from ..errors import BiasCompensationError
from ..marks import mark, unmark
from ..names import KEY
from ..vectors.checkpoint import checkpoint_files, read_settings, read_vectors
from ..vectors.compensation import Compensation
from ..vectors.joint import note_saved_without, saved_without

R = TypeVar("R")

# The files of the checkpoint that a loader is reading, where it tells of them.
files_read: ContextVar[tuple[Path, ...] | None] = ContextVar("files_read", default=None)


def read_compensation(
    entry: Mapping[str, Any] | None, files: Iterable[str | Path]
) -> Compensation | None:
    """The compensation that a checkpoint's quantization config announces and its files hold.

    Returns:
        None for a checkpoint without vectors.

    Raises:
        BiasCompensationError: only one of the two is there, or they do not fit.
    """
    if entry is not None and not saved_without(entry):
        return Compensation.from_entry(entry, read_vectors(files))
    # Only safetensors files can be looked into without reading all of them.
    vectors = read_vectors(file for file in files if str(file).endswith(".safetensors"))
    if vectors:
        raise BiasCompensationError(
            f"the checkpoint holds {len(vectors)} compensation tensors, the first is "
            f"{next(iter(vectors))}.{KEY}, but its quantization config has no {KEY} entry; "
            "restore the config it was saved with, or load it without bc_plugin.enable()."
        )
    return None


def load_if_any(folder: str | Path) -> Compensation | None:
    """The compensation of the checkpoint in ``folder``, None when it has none."""
    return read_compensation(read_settings(folder).get(KEY), checkpoint_files(folder))


def hold_for(model: nn.Module, checkpoint: str | Path) -> None:
    """Check the compensation of a checkpoint just read, and keep it until ``attach_held``.

    Between the two, kernels are initialised, which may repack the weights the digest is taken of.

    Args:
        checkpoint: The folder, or a file in it.
    """
    path = Path(checkpoint)
    folder = path if path.is_dir() else path.parent
    note_saved_without(read_settings(folder).get(KEY), model)
    compensation = load_if_any(folder)
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
    if compensation is None:
        return initialise()
    compensation.check(model)
    result = initialise()
    compensation.attach_unchecked(model)
    return result


def fit_to(compensation: Compensation, model: nn.Module) -> Compensation:
    """The same vectors under the names of ``model``, which may be a base model without a head."""
    prefix = getattr(model, "base_model_prefix", "") + "."
    names = {name for name, _ in model.named_modules()}
    blocks = compensation.blocks
    if names.issuperset(blocks) or not all(path.startswith(prefix) for path in blocks):
        return compensation
    return compensation.renamed(lambda name: name.removeprefix(prefix))
