"""Tensors that stay in safetensors files until they are asked for, and may become others."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..vectors.lazy import LazyTensor, Values


class StoredTensors(Values):
    """Tensors of files, memory-mapped anew whenever they are asked for.

    Args:
        tensors: By name.

    Attributes:
        changed: Those that are other ones now than in the files.
    """

    def __init__(self, tensors: Mapping[str, LazyTensor]) -> None:
        super().__init__(tensors)
        self.changed: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        return self.changed[name] if name in self.changed else self.tensors[name].stored.mapped()
