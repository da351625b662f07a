"""A checkpoint's vectors and weights, read from the files that its loader reads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from ..errors import BiasCompensationError
from ..names import FILE, FILES_DIGEST, KEY, SETTINGS_DIGEST, SUFFIX
from .lazy import reading, tensors_in
from .settings import read_json, require_settings, settings_digest

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# In the order in which transformers looks for them; toolkits' own names come after these.
_KNOWN = (
    SINGLE,
    INDEX,
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def checkpoint_files(checkpoint: str | Path) -> list[Path]:
    """The weight files of a checkpoint.

    Args:
        checkpoint: A folder, a file of weights, or the index of several.

    Returns:
        None for a folder without weights.

    Raises:
        BiasCompensationError: an index is damaged, or names a file that is not there; a folder has
            weights of several checkpoints, and none under a name that goes first.
    """
    path = Path(checkpoint)
    if path.suffix == ".json":
        return _listed(path)
    if not path.is_dir():
        return [path]
    for name in _KNOWN:
        if (path / name).is_file():
            return checkpoint_files(path / name)
    found = sorted(path.glob("*.safetensors.index*.json"))
    found = found or sorted(p for p in path.glob("*.safetensors") if p.name != FILE)
    if len(found) > 1:
        raise BiasCompensationError(
            f"{path} has weights under several names, {found[0].name} and {found[1].name}, so "
            f"which of them are its own is unknown; leave one, or name it {SINGLE}."
        )
    return checkpoint_files(found[0]) if found else []


def _listed(index: Path) -> list[Path]:
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
    except (KeyError, AttributeError, TypeError) as error:
        raise BiasCompensationError(
            f"{index} is no index of weights: it has no weight_map of names; download or save the "
            "checkpoint again."
        ) from error
    files = [index.parent / str(name) for name in names]
    for file in files:
        if not file.is_file():
            raise BiasCompensationError(
                f"{index} names {file.name}, which is not there; download or save the checkpoint "
                "again."
            )
    return files


def other_files(folder: Path) -> Iterator[Path]:
    """The files of a checkpoint that hold no weights, vectors included."""
    for file in folder.iterdir():
        weights = file.suffix in (".safetensors", ".bin") or file.name.endswith(".index.json")
        if file.is_file() and not weights:
            yield file


def read_metadata(path: Path) -> dict[str, Any]:
    """What a file of vectors alone says of them, empty if nothing.

    Raises:
        BiasCompensationError: it is damaged.
    """
    with reading(path), safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get(KEY)
        return {} if text is None else {KEY: json.loads(text)}


@contextmanager
def naming(files: Iterable[str | Path]) -> Iterator[None]:
    """While it lasts, errors of ours begin with the files that they are about."""
    try:
        yield
    except BiasCompensationError as error:
        raise BiasCompensationError(f"{named(files)}: {error}") from error


def named(files: Iterable[str | Path]) -> str:
    """Files of one folder, as an error names them."""
    first, *rest = [*map(Path, files)] or [Path("the checkpoint")]
    return f"{first} to {rest[-1].name}" if rest else str(first)


def read_vectors(files: Iterable[str | Path]) -> dict[str, Tensor]:
    """The compensation tensors in a checkpoint's files, by site name.

    Raises:
        BiasCompensationError: a file is damaged, or two have a tensor of one name.
    """
    vectors: dict[str, Tensor] = {}
    for path in files:
        for key, tensor in tensors_in(path, vectors=True).items():
            name = key.removesuffix(SUFFIX)
            if name in vectors:
                raise BiasCompensationError(
                    f"{path} has {key} a second time; another file of the checkpoint has it, too. "
                    "Download or save the checkpoint again."
                )
            vectors[name] = tensor.read()
    return vectors


def files_digest(files: Iterable[str | Path]) -> str:
    """BLAKE2b over names, types, shapes and all bytes of a checkpoint's tensors but the vectors.

    How they are spread over files makes no difference.

    Raises:
        BiasCompensationError: a file is damaged.
    """
    digest = hashlib.blake2b(digest_size=16)
    found = {
        key: f"{key} {tensor.dtype} {tuple(tensor.shape)} {tensor.fingerprint()}"
        for path in files
        for key, tensor in tensors_in(path, vectors=False).items()
    }
    for _, text in sorted(found.items()):
        digest.update(text.encode())
    return digest.hexdigest()


def bound_to(folder: str | Path, entry: dict[str, Any]) -> dict[str, Any]:
    """An entry with what binds it to the checkpoint in ``folder``: its weights and its settings.

    Raises:
        BiasCompensationError: a file of it is damaged.
    """
    return {
        **entry,
        FILES_DIGEST: files_digest(checkpoint_files(folder)),
        SETTINGS_DIGEST: settings_digest(folder),
    }


def require_bound(entry: Mapping[str, Any], files: Iterable[str | Path]) -> None:
    """Make sure that an entry was written with these files' weights, and the settings beside them.

    An entry that was saved without ``bc_plugin.enable()`` does not say.

    Raises:
        BiasCompensationError: it was written with others.
    """
    expected, files = entry.get(FILES_DIGEST), list(files)
    if expected is None:
        return
    require_settings(entry, Path(files[0]).parent)
    digest = files_digest(files)
    if digest != expected:
        raise BiasCompensationError(
            f"the weights in {named(files)} are not those that its {KEY} entry was written with: "
            f"their digest is {digest}, expected {expected}. A file is damaged, or of another "
            "save, or a tensor was changed since; download or save the checkpoint again, or "
            "compensate it again."
        )
