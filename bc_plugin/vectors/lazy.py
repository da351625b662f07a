"""Tensors of a checkpoint's files that are read, or made, when they are asked for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import BiasCompensationError
from ..names import SUFFIX
from .fingerprint import PART, fingerprint, fingerprint_of_parts


@contextmanager
def reading(what: str | Path) -> Iterator[None]:
    """While it lasts, what a damaged file leads to is an error of ours.

    Args:
        what: The file, or the file and what of it is read.
    """
    try:
        yield
    except (SafetensorError, OSError, ValueError, RuntimeError, EOFError) as error:
        raise BiasCompensationError(
            f"{what} cannot be read ({str(error) or type(error).__name__}); it is damaged, or not "
            "all of it was written: download or save the checkpoint again."
        ) from error


@dataclass(frozen=True)
class Stored:
    """Where a safetensors file has the bytes of a tensor.

    Attributes:
        path: The file.
        key: The tensor's name in it.
        header: What the file's header says of it: its ``dtype``, ``shape`` and ``data_offsets``.
        start: Where in the file its bytes begin.
    """

    path: Path
    key: str
    header: dict[str, Any]
    start: int

    @property
    def size(self) -> int:
        """In bytes."""
        first, end = self.header["data_offsets"]
        return end - first

    def pieces(self) -> Iterator[memoryview]:
        """Its bytes, ``PART`` of them at a time; each piece is overwritten by the next.

        Raises:
            BiasCompensationError: the file is damaged, or gone.
        """
        buffer, left = memoryview(bytearray(min(PART, self.size))), self.size
        with reading(self.path), self.path.open("rb") as file:
            file.seek(self.start)
            while left:
                piece = buffer[:left]
                _fill(file, piece)
                yield piece
                left -= len(piece)

    def read(self, dtype: torch.dtype, shape: torch.Size) -> Tensor:
        """All of it, as a tensor."""
        data = torch.empty(self.size, dtype=torch.uint8, device="cpu")
        with reading(self.path), self.path.open("rb") as file:
            file.seek(self.start)
            _fill(file, data.numpy())
        return data.view(dtype).view(shape)

    def mapped(self) -> Tensor:
        """The tensor, memory-mapped: only what is used of it is read, and let go with it.

        Raises:
            BiasCompensationError: the file is damaged, or gone.
        """
        with reading(f"{self.path}: its tensor {self.key}"), safe_open(self.path, "pt") as file:
            return file.get_tensor(self.key)


def _fill(file: BinaryIO, buffer: Any) -> None:
    if file.readinto(buffer) != len(buffer):
        raise EOFError("it ends in the middle of a tensor")


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is not in memory before it is asked for, nor kept after.

    Attributes:
        dtype, shape: As ``read`` returns it.
        read: Reads or makes it, anew each time.
        stored: Where it is as it is, if it is anywhere.
    """

    dtype: torch.dtype
    shape: torch.Size
    read: Callable[[], Tensor]
    stored: Stored | None = None

    @classmethod
    def of(cls, tensor: Tensor) -> LazyTensor:
        """One that is in memory already."""
        return cls(tensor.dtype, tensor.shape, lambda: tensor)

    def empty(self) -> Tensor:
        """One of its type and shape, on the meta device."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")

    def narrow(self, dim: int, start: int, length: int) -> LazyTensor:
        """A part of it, as ``torch.narrow`` has it."""
        shape = torch.Size((*self.shape[:dim], length, *self.shape[dim + 1 :]))
        return LazyTensor(self.dtype, shape, lambda: self.read().narrow(dim, start, length))

    def fingerprint(self) -> int:
        """As ``fingerprint`` has it; one that is stored is not read as a whole."""
        if self.stored is None:
            return fingerprint(self.read())
        return fingerprint_of_parts(
            torch.frombuffer(piece, dtype=torch.uint8) for piece in self.stored.pieces()
        )


class Values(Mapping[str, Tensor]):
    """The values of lazy tensors, each read anew whenever it is asked for.

    Args:
        tensors: By name.
    """

    def __init__(self, tensors: Mapping[str, LazyTensor]) -> None:
        self.tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def tensors_in(path: str | Path, vectors: bool) -> dict[str, LazyTensor]:
    """The compensation tensors of a file, or all but those, in the order of their names.

    Raises:
        BiasCompensationError: the file is damaged.
    """
    path = Path(path)
    with reading(path):
        found = LISTINGS[path.suffix](path) if path.suffix in LISTINGS else {}
    return {key: found[key] for key in sorted(found) if key.endswith(SUFFIX) == vectors}


def _in_safetensors(path: Path) -> dict[str, LazyTensor]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        # Opened, it is known to be whole, and its header to be right.
        with safe_open(path, "pt") as opened:
            header, found = json.loads(file.read(length)), {}
            for key in opened.keys():  # noqa: SIM118, not a dict
                like = opened.get_tensor(key)  # memory-mapped, and not touched
                start = 8 + length + header[key]["data_offsets"][0]
                stored = Stored(path, key, header[key], start)
                read = partial(stored.read, like.dtype, like.shape)
                found[key] = LazyTensor(like.dtype, like.shape, read, stored)
    return found


def _in_pickle(path: Path) -> dict[str, LazyTensor]:
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return {
        key: LazyTensor(tensor.dtype, tensor.shape, tensor.clone)
        for key, tensor in state.items()
        if isinstance(tensor, Tensor)
    }


LISTINGS = {".safetensors": _in_safetensors, ".bin": _in_pickle}
