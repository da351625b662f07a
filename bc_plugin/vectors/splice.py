"""Safetensors files written tensor by tensor; what is in files already is copied byte by byte.

``safetensors.torch.save_file`` takes tensors that are all there; of memory-mapped ones it leaves
every page in memory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import save

from .lazy import LazyTensor

FORMAT = {"format": "pt"}  # metadata without which transformers loads no file
LENGTH, ALIGNMENT = 8, 8  # bytes that say how long the header is, and what that is padded to


def write_tensors(
    path: Path, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file, with one tensor at a time in memory.

    Args:
        path: The file, which is written in place.
        tensors: By name. Those that are stored must not be in that file.
        metadata: Of the file's header.

    Raises:
        BiasCompensationError: a file that tensors are read from is damaged.
    """
    # The widest first, as safetensors has them, so that all are aligned.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        about, size = _described(tensors[name])
        header[name] = {**about, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(LENGTH, "little") + text)
        for name in names:
            _write(file, name, tensors[name])


def write_index(path: Path, metadata: Mapping[str, Any], places: Mapping[str, str]) -> None:
    """Write which file of a checkpoint of several has which tensor."""
    index = {"metadata": metadata, "weight_map": places}
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _described(tensor: LazyTensor) -> tuple[dict[str, Any], int]:
    """The type and the shape of a tensor as a header has them, and its size in bytes."""
    if tensor.stored is not None:
        own = tensor.stored.header
        return {"dtype": own["dtype"], "shape": own["shape"]}, tensor.stored.size
    about = {"dtype": _type_name(tensor.dtype), "shape": list(tensor.shape)}
    return about, tensor.shape.numel() * tensor.dtype.itemsize


@cache
def _type_name(dtype: torch.dtype) -> str:
    """What safetensors calls a type."""
    file = save({"it": torch.empty(0, dtype=dtype, device="cpu")})
    length = int.from_bytes(file[:LENGTH], "little")
    return json.loads(file[LENGTH : LENGTH + length])["it"]["dtype"]


def _write(file: BinaryIO, name: str, tensor: LazyTensor) -> None:
    if tensor.stored is not None:
        for piece in tensor.stored.pieces():
            file.write(piece)
        return
    made = tensor.read().detach()
    if (made.dtype, made.shape) != (tensor.dtype, tensor.shape):
        raise ValueError(
            f"{name} is {made.dtype} {tuple(made.shape)}, and was announced as {tensor.dtype} "
            f"{tuple(tensor.shape)}."
        )
    file.write(made.cpu().contiguous().view(-1).view(torch.uint8).numpy())
