"""Tensors that stay in safetensors files until they are asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import BiasCompensationError


@dataclass(frozen=True)
class Place:
    """Where a tensor is.

    Attributes:
        file: The safetensors file.
        key: Its name in there.
        shape: Its shape.
    """

    file: Path
    key: str
    shape: tuple[int, ...]

    def read(self) -> Tensor:
        """The tensor, memory-mapped: only what is used of it is read, and let go with it.

        Raises:
            BiasCompensationError: the file is damaged, or gone.
        """
        with _reading(self.file, f"its tensor {self.key}"), safe_open(self.file, "pt") as file:
            return file.get_tensor(self.key)


def places_in(files: Iterable[Path]) -> dict[str, Place]:
    """Where each tensor of some files is, by its name there.

    Raises:
        BiasCompensationError: a file is damaged.
    """
    found = {}
    for path in files:
        with _reading(path, "its header"), safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118, not a dict
                found[key] = Place(path, key, tuple(file.get_slice(key).get_shape()))
    return found


@contextmanager
def _reading(path: Path, what: str) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise BiasCompensationError(
            f"{path}: {what} cannot be read ({error}); the file is damaged, or not all of it was "
            "written: download or save the checkpoint again."
        ) from error


class StoredTensors(Mapping[str, Tensor]):
    """Tensors by name, each read anew whenever it is asked for.

    Args:
        places: Where they are.

    Attributes:
        changed: Those that are other ones now than in the files.
    """

    def __init__(self, places: Mapping[str, Place]) -> None:
        self.places = dict(places)
        self.changed: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        return self.changed[name] if name in self.changed else self.places[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)
