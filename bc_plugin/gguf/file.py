"""A GGUF file, read by the ``gguf`` package."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BiasCompensationError

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

SUFFIX = ".gguf"
FLOATS = ("F32", "F16", "BF16")
PARTS = "split.count"  # in each file of a model that is split over several


def is_gguf(name: str | Path) -> bool:
    """Whether a name is that of a GGUF file."""
    return Path(name).suffix.lower() == SUFFIX


def control_of(path: Path) -> Path:
    """Where the control vector of a compensated file is, if it has one."""
    return path.with_name(f"{path.stem}.control{SUFFIX}")


class GGUFFile:
    """Metadata and tensors of a GGUF file, which stay on disk until they are used.

    Attributes:
        path: Where it is.
        reader: What the ``gguf`` package has read.

    Raises:
        BiasCompensationError: there is no such file, or it is damaged, incomplete or one of several
            parts; or the package is missing.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise BiasCompensationError(f"there is no file {path}; name a GGUF file.")
        self.reader = _reader(self.path)
        parts = self.value(PARTS, 1)
        if parts > 1:
            raise BiasCompensationError(
                f"{path} is one of {parts} parts of a GGUF file; put them together first, with "
                "`llama-gguf-split --merge FIRST_PART WHOLE.gguf`."
            )

    def value(self, key: str, otherwise: Any = None) -> Any:
        """A value of the metadata."""
        field = self.reader.get_field(key)
        return otherwise if field is None else field.contents()

    @cached_property
    def architecture(self) -> str:
        """llama.cpp's name of it."""
        return str(self.value("general.architecture"))

    def setting(self, key: str, otherwise: Any = None) -> Any:
        """A value of the metadata that is the architecture's own."""
        return self.value(f"{self.architecture}.{key}", otherwise)

    @cached_property
    def tensors(self) -> dict[str, ReaderTensor]:
        """All tensors, by name, in the file's order."""
        return {tensor.name: tensor for tensor in self.reader.tensors}

    @property
    def is_float(self) -> bool:
        """Whether no tensor is quantized."""
        return all(tensor.tensor_type.name in FLOATS for tensor in self.reader.tensors)

    def types(self) -> dict[str, int]:
        """By type of tensor, how many there are, the most frequent first."""
        names = [tensor.tensor_type.name for tensor in self.reader.tensors]
        return dict(sorted(((name, names.count(name)) for name in set(names)), key=lambda x: -x[1]))

    def digest(self, without: Collection[str] = ()) -> str:
        """BLAKE2b over names, types, shapes and bytes of all tensors but some."""
        digest = hashlib.blake2b(digest_size=16)
        for name, tensor in sorted(self.tensors.items()):
            if name not in without:
                shape = tuple(tensor.shape.tolist())
                digest.update(f"{name} {tensor.tensor_type.name} {shape}".encode())
                digest.update(tensor.data.reshape(-1).view("uint8"))
        return digest.hexdigest()


def _reader(path: Path) -> GGUFReader:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise BiasCompensationError(
            'reading GGUF files needs the gguf package: pip install "bc-plugin[gguf]".'
        ) from error
    try:
        return GGUFReader(path)
    except Exception as error:  # of many kinds: it reads on whatever it has found
        raise BiasCompensationError(
            f"{path} is no GGUF file, or is damaged or incomplete ({type(error).__name__}: "
            f"{error}); download or make it again."
        ) from error
