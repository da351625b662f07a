"""From a compensated model to files that belong together, the same for every toolkit's save."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from torch import nn

from ..errors import BiasCompensationError
from ..models.repacked import require_as_stored
from ..names import KEY
from ..vectors.card import write_card
from ..vectors.checkpoint import INDEX, SINGLE, checkpoint_files, read_vectors
from ..vectors.compensation import Compensation
from ..vectors.entry import vectors_digest
from ..vectors.joint import entry_to_save
from ..vectors.written import write_entry

Stamps = dict[str, tuple[int, int]]

# Toolkits save with each other's functions; what the outermost has written is looked at.
_saving: ContextVar[bool] = ContextVar("_saving", default=False)


@contextmanager
def saved_whole(
    model: nn.Module, folder: str | Path, from_memory: bool = True
) -> Iterator[Compensation | None]:
    """While it lasts a toolkit writes ``model`` into ``folder``; then all of it is bound together.

    Args:
        from_memory: Whether its weights are written as they are in memory.

    Yields:
        The compensation of the model, if it has one. A model that no vectors are known of is
        left to the toolkit.

    Raises:
        BiasCompensationError: kernels have repacked the model's weights; the vectors in the files
            are not those of the model.
    """
    compensation = Compensation.attached_to(model)
    entry = entry_to_save(model)
    if entry is None or _saving.get():
        yield compensation
        return
    held = ("",) if compensation is None else compensation.blocks
    for path in held if from_memory else ():
        require_as_stored(model.get_submodule(path), path)
    folder = Path(folder)
    before = _stamps(folder)
    token = _saving.set(True)
    try:
        yield compensation
    finally:
        _saving.reset(token)
    written = {name for name, stamp in _stamps(folder).items() if before.get(name) != stamp}
    if written:  # an adapter's save writes no weights
        _remove_stale(folder, written)
        if compensation is not None:
            _require_vectors(compensation, folder)
        write_entry(folder, entry)
        write_card(folder)


def _stamps(folder: Path) -> Stamps:
    """When files of weights were written, and how large they are, by name."""
    files = (*folder.glob("*.safetensors"), *folder.glob("*.bin"), *folder.glob("*.index.json"))
    return {p.name: (p.stat().st_mtime_ns, p.stat().st_size) for p in files}


def _remove_stale(folder: Path, written: set[str]) -> None:
    """Of one file of weights and an index of several, loaders would take the wrong one."""
    for new, stale in ((INDEX, SINGLE), (SINGLE, INDEX)):
        if new in written and stale not in written:
            (folder / stale).unlink(missing_ok=True)


def _require_vectors(compensation: Compensation, folder: Path) -> None:
    found = read_vectors(checkpoint_files(folder))
    same = found.keys() == compensation.vectors.keys()
    if not same or vectors_digest(compensation.replaced(vectors=found)) != vectors_digest(
        compensation
    ):
        raise BiasCompensationError(
            f"{folder} was written, but its {len(found)} compensation tensors are not the "
            f"{len(compensation.vectors)} that are attached to the model, so it must not be used. "
            "Save the vectors by themselves, compensation.save(folder), and detach them before "
            "saving the model."
        )


@contextmanager
def plain_vectors(model: nn.Module) -> Iterator[Compensation | None]:
    """While this lasts the vectors are buffers of a model that is not compensated by them.

    For toolkits that collect a model's tensors themselves, past the hooks of its state dict: no
    bias has a vector merged into it then, so whoever reads tensor after tensor reads what belongs
    into a file.
    """
    compensation = Compensation.attached_to(model)
    if compensation is None:
        yield None
        return
    compensation.detach(model)
    put_vectors(compensation, model)
    try:
        yield compensation
    finally:
        take_vectors(compensation, model)
        compensation.attach_unchecked(model)


def put_vectors(compensation: Compensation, model: nn.Module) -> None:
    """Make the vectors buffers of ``model``, without compensating it."""
    for name, vectors in compensation.vectors.items():
        model.get_submodule(name).register_buffer(KEY, vectors)


def take_vectors(compensation: Compensation, model: nn.Module) -> None:
    """Undo ``put_vectors``."""
    for name in compensation.vectors:
        delattr(model.get_submodule(name), KEY)
