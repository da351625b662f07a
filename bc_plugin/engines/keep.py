"""A checkpoint that stays compensated: the same weights in other words, and the same vectors.

For an engine that has no kernels for the width it was quantized with, but knows of the vectors.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import nn

from ..names import SUFFIX
from ..vectors.compensation import Compensation
from ..vectors.lazy import LazyTensor, Values
from ..vectors.weights import weights_of
from ..vectors.written import write_entry
from .plain import read_tensors, write_checkpoint


def write_kept(
    folder: Path,
    source: Path,
    tensors: Mapping[str, LazyTensor],
    config: dict[str, Any],
    compensation: Compensation,
) -> None:
    """Write ``tensors`` and ``config`` with the vectors, bound to them anew.

    Args:
        folder: Where to; it is there.
        source: The folder they were read from, whose other files are copied.
    """
    vectors = {name + SUFFIX: LazyTensor.of(v) for name, v in compensation.vectors.items()}
    write_checkpoint(folder, source, {**tensors, **vectors}, config)
    written = _as_modules(read_tensors(folder))
    weights = weights_of(written, compensation.blocks, compensation.vectors)
    kept = compensation.replaced(digest=weights.digest, float_weights=weights.float_weights)
    write_entry(folder, kept.entry())


def _as_modules(tensors: Mapping[str, LazyTensor]) -> nn.Module:
    """Modules that stand for a checkpoint's tensors, and have digests as a model's have."""
    root = nn.Module()
    # Block 10 after block 9, as a model has them.
    for name in sorted(tensors, key=_in_order):
        *path, leaf = name.split(".")
        owner = root
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner._modules[part]
        owner.register_buffer(leaf, tensors[name].empty())
    root._hf_hook = SimpleNamespace(weights_map=Values(tensors))  # as if accelerate kept them
    return root


def _in_order(name: str) -> list[tuple[int, str]]:
    return [(int(part) if part.isdigit() else -1, part) for part in name.split(".")]
