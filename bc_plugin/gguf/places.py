"""Which sites of a model a GGUF file has a place for, and where."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import BiasCompensationError
from ..models.architectures import ARCHITECTURES, InGGUF
from .file import GGUFFile

if TYPE_CHECKING:
    import numpy as np

# llama.cpp's names of architectures that transformers calls otherwise.
MODEL_TYPES = {"gemma3": "gemma3_text"}
BLOCKS = "model.layers"  # the path of the blocks, in every architecture of the table
DEPTH = BLOCKS.count(".") + 2  # parts in the name of a block


@dataclass(frozen=True)
class Places:
    """Where vectors go.

    Attributes:
        biases: By site, the name of the tensor that is its bias. A block's is that of its last
            linear, which then is no site of its own: the block's vector takes out that shift, too.
        directions: By block, the name of its tensor in a control vector.
        heads: By name of a bias tensor, in how many heads its values are permuted.
        last: The linear, by its path within a block, whose bias is the block's.
    """

    biases: Mapping[str, str]
    directions: Mapping[str, str]
    heads: Mapping[str, int]
    last: str | None

    def __contains__(self, site: str) -> bool:
        return site in self.biases or site in self.directions

    def left(self, linears: Iterable[str]) -> list[str]:
        """Those of some linears, and of their blocks, that there is no place for."""
        own = [name for name in linears if self.last is None or not name.endswith(f".{self.last}")]
        blocks = dict.fromkeys(".".join(name.split(".")[:DEPTH]) for name in own)
        return [name for name in (*own, *blocks) if name not in self]

    def stored(self, tensor: str, bias: np.ndarray) -> np.ndarray:
        """A bias in the order of the file's output channels, which is the converter's."""
        if tensor not in self.heads:
            return bias
        return bias.reshape(self.heads[tensor], 2, -1).swapaxes(1, 2).reshape(-1)

    def read(self, tensor: str, stored: np.ndarray) -> np.ndarray:
        """What ``stored`` was made of."""
        if tensor not in self.heads:
            return stored
        return stored.reshape(self.heads[tensor], -1, 2).swapaxes(1, 2).reshape(-1)


def places_in(file: GGUFFile) -> Places:
    """Which sites a file has a place for.

    Raises:
        BiasCompensationError: what llama.cpp reads of its architecture is not known here.
    """
    known, count = _architecture(file), int(file.setting("block_count"))
    biases, heads = {}, {}
    for number in range(count):
        for linear in known.biases:
            site = f"{BLOCKS}.{number}.{linear}"
            tensor = f"{_name_in_file(file, site, count)}.bias"
            biases[f"{BLOCKS}.{number}" if linear == known.last else site] = tensor
            if linear in known.permuted:
                heads[tensor] = _heads(file, linear)
    directions = {}
    if known.last is None:  # a control vector never reaches the first block
        directions = {f"{BLOCKS}.{n}": f"direction.{n}" for n in range(1, count)}
    return Places(biases, directions, heads, known.last)


def _architecture(file: GGUFFile) -> InGGUF:
    name = file.architecture
    known = ARCHITECTURES.get(MODEL_TYPES.get(name, name))
    if known is None or known.gguf is None:
        able = sorted(kind for kind, found in ARCHITECTURES.items() if found.gguf is not None)
        raise BiasCompensationError(
            f"{file.path} is of the architecture {name!r}; which biases llama.cpp reads of that is "
            f"not known here. Known are {able}."
        )
    if file.setting("expert_count", 0):
        raise BiasCompensationError(
            f"{file.path} is a mixture of experts, of which llama.cpp reads no biases here; "
            "compensate a dense model."
        )
    return known.gguf


def _name_in_file(file: GGUFFile, site: str, count: int) -> str:
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    (kind,) = (arch for arch, name in MODEL_ARCH_NAMES.items() if name == file.architecture)
    name = get_tensor_name_map(kind, count).get_name(site)
    if name is None or f"{name}.weight" not in file.tensors:
        raise BiasCompensationError(
            f"{file.path} has no weight for {site} of its own, as where q, k and v are in one "
            "tensor; convert the model again with llama.cpp's convert_hf_to_gguf.py."
        )
    return name


def _heads(file: GGUFFile, linear: str) -> int:
    heads = int(file.setting("attention.head_count"))
    own = file.setting("attention.head_count_kv", heads) if "k_proj" in linear else heads
    return int(own)
