"""Vectors that are damaged, or another run's."""

from __future__ import annotations

from collections.abc import Callable

import torch
from safetensors.torch import load_file
from torch import Tensor

from bc_plugin.names import SUFFIX

from .cases import DAMAGED, EITHER, Case
from .folders import Folder

BLOCK, LINEAR, LAST = "model.layers.0", "model.layers.0.mlp.down_proj", "model.layers.1"
SITES = {"a block": BLOCK, "a linear": LINEAR, "the last block": LAST}
VECTORS = "model.safetensors|bias_compensation.safetensors"  # or a tensor's name

ANY = "|".join(["model.layers.", *(f"{site}{SUFFIX}" for site in ("model.norm", "lm_head", " "))])


def _one(family: str, what: str, site: str, change: Callable[[Tensor], Tensor]) -> Case:
    """One site's vectors, changed."""

    def run(folder: Folder) -> None:
        with folder.tensors() as tensors:
            tensors[site + SUFFIX] = change(tensors[site + SUFFIX].clone())

    return Case(family, what, run, DAMAGED, (f"{VECTORS}|{site + SUFFIX}",))


def _all(family: str, what: str, change: Callable[[dict[str, Tensor], Folder], None]) -> Case:
    """Any of the vectors, changed; a refusal may name one of the sites."""

    def run(folder: Folder) -> None:
        with folder.tensors() as tensors:
            change(tensors, folder)

    return Case(family, what, run, DAMAGED, (f"{VECTORS}|{ANY}",))


def _flip(position: int, bit: int) -> Callable[[Tensor], Tensor]:
    def change(vectors: Tensor) -> Tensor:
        vectors.view(-1).view(torch.uint8)[position] ^= 1 << bit
        return vectors

    return change


def _with(value: float) -> Callable[[Tensor], Tensor]:
    def change(vectors: Tensor) -> Tensor:
        vectors[-1, 5] = value
        return vectors

    return change


VALUES = {
    "the lowest bit of the first value flipped": _flip(0, 0),
    "the sign of the last value flipped": _flip(-1, 7),
    "a bit in the middle flipped": _flip(101, 3),
    "zeros": torch.zeros_like,
    "ones": torch.ones_like,
    "negated": torch.neg,
    "rows swapped": lambda v: v.flip(0),
    "values reversed": lambda v: v.flip(1),
    "rolled by one": lambda v: v.roll(1, 1),
    "NaN": _with(float("nan")),
    "infinity": _with(float("inf")),
}
TYPES = {
    "as float32": lambda v: v.float(),
    "as float64": lambda v: v.double(),
    "as bfloat16": lambda v: v.bfloat16(),
    "its bytes as int16": lambda v: v.view(torch.int16),
    "its bytes as bfloat16": lambda v: v.view(torch.bfloat16),
}
SHAPES = {
    "(rows, 1)": lambda v: v[:, :1],
    "(1, width)": lambda v: v[:1],
    "(1, 1)": lambda v: v[:1, :1],
    "a row more": lambda v: torch.cat([v, v[-1:]]),
    "a value less": lambda v: v[:, :-1],
    "a value more": lambda v: torch.cat([v, v[:, :1]], 1),
    "transposed": lambda v: v.T,
    "flat": lambda v: v.reshape(-1),
    "the last row alone": lambda v: v[-1],
    "a third axis": lambda v: v[..., None],
    "no rows": lambda v: v[:0],
    "a scalar": lambda v: v[0, 0],
    "folded into twice the rows": lambda v: v.reshape(2 * len(v), -1),
}


def _swap(first: str, second: str):
    def change(tensors: dict[str, Tensor], folder: Folder) -> None:
        one, two = first + SUFFIX, second + SUFFIX
        tensors[one], tensors[two] = tensors[two], tensors[one]

    return change


def _of_another_run(*only: str):
    def change(tensors: dict[str, Tensor], folder: Folder) -> None:
        theirs = load_file(folder.other("vectors", folder.file.name))
        names = [site + SUFFIX for site in only] or folder.vectors()
        tensors.update({name: theirs[name] for name in names})

    return change


def _drop(*sites: str):
    def change(tensors: dict[str, Tensor], folder: Folder) -> None:
        for name in [site + SUFFIX for site in sites] or folder.vectors():
            del tensors[name]

    return change


def _add(site: str, width: int):
    def change(tensors: dict[str, Tensor], folder: Folder) -> None:
        tensors[site + SUFFIX] = torch.zeros(2, width, dtype=torch.float16)

    return change


def _rename(old: str, new: str):
    def change(tensors: dict[str, Tensor], folder: Folder) -> None:
        for name in folder.vectors():
            if name.startswith(old):
                tensors[new + name.removeprefix(old)] = tensors.pop(name)

    return change


ATTENTION = "model.layers.0.self_attn"
SETS = {
    "of another run": _of_another_run(),
    "a block's of another run": _of_another_run(BLOCK),
    "a linear's of another run": _of_another_run(LINEAR),
    "blocks swapped": _swap(BLOCK, LAST),
    "linears of two blocks swapped": _swap(LINEAR, "model.layers.1.mlp.down_proj"),
    "linears of one block swapped": _swap(f"{ATTENTION}.q_proj", f"{ATTENTION}.o_proj"),
    "a block's and a linear's swapped": _swap(BLOCK, LINEAR),
    "a block's are missing": _drop(BLOCK),
    "a linear's are missing": _drop(LINEAR),
    "the last ones are missing": _drop(LAST),
    "all are missing": _drop(),
    "some of a norm": _add("model.norm", 128),
    "some of the head": _add("lm_head", 128),
    "some of a block that is not there": _add("model.layers.7", 128),
    "some without a name": _add("", 128),
    "a linear renamed": _rename(f"{ATTENTION}.q_proj", f"{ATTENTION}.query"),
    "a block renumbered": _rename(f"{LAST}.bias", "model.layers.2.bias"),
    "all without their prefix": _rename("model.", ""),
    "all with another prefix": _rename("model.", "transformer."),
}


def _twice(first: bool):
    """A second copy, in another shard; the index names the first shard or the second."""

    def run(folder: Folder) -> None:
        paths = folder.shard()
        name = folder.vectors()[0] if folder.file in paths else BLOCK + SUFFIX
        here = next(path for path in paths if name in load_file(path))
        there = next(path for path in paths if path != here)
        with folder.tensors(there) as tensors:
            tensors[name] = torch.ones_like(load_file(here)[name])
        if not first:
            index = folder.path / "model.safetensors.index.json"
            old, new = f'"{name}": "{here.name}"', f'"{name}": "{there.name}"'
            assert old in index.read_text()
            index.write_text(index.read_text().replace(old, new))

    return run


NAMES = (f"model-00001-of-00002.safetensors|model-00002-of-00002.safetensors|{BLOCK + SUFFIX}",)
CASES = [
    *(
        _one("values of vectors", f"{where}: {what}", site, change)
        for where, site in SITES.items()
        for what, change in VALUES.items()
    ),
    *(
        _one("types of vectors", f"{where}: {what}", site, change)
        for where, site in list(SITES.items())[:2]
        for what, change in TYPES.items()
    ),
    *(
        _one("shapes of vectors", f"{where}: {what}", site, change)
        for where, site in list(SITES.items())[:2]
        for what, change in SHAPES.items()
    ),
    *(_all("sets of vectors", what, change) for what, change in SETS.items()),
]
IN_SHARDS = [
    Case("sets of vectors", "a second copy, not in the index", _twice(True), EITHER, NAMES),
    Case("sets of vectors", "a second copy, in the index", _twice(False), DAMAGED, NAMES),
]
