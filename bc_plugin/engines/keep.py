"""A checkpoint that stays compensated: the same weights in other words, and the same vectors.

For an engine that has no kernels for the width it was quantized with, but knows of the vectors.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..names import SUFFIX
from ..vectors.compensation import Compensation
from ..vectors.weights import weights_of
from ..vectors.written import write_entry
from .plain import write_checkpoint


def write_kept(
    folder: Path,
    source: Path,
    tensors: dict[str, Tensor],
    config: dict[str, Any],
    compensation: Compensation,
) -> None:
    """Write ``tensors`` and ``config`` with the vectors, bound to them anew.

    Args:
        folder: Where to; it is there.
        source: The folder they were read from, whose other files are copied.
    """
    weights = weights_of(_as_modules(tensors), compensation.blocks, compensation.vectors)
    kept = compensation.replaced(digest=weights.digest, float_weights=weights.float_weights)
    vectors = {name + SUFFIX: vector.contiguous() for name, vector in kept.vectors.items()}
    write_checkpoint(folder, source, {**tensors, **vectors}, config)
    write_entry(folder, kept.entry())


def _as_modules(tensors: Mapping[str, Tensor]) -> nn.Module:
    """Modules that hold a checkpoint's tensors, which have digests as a model's have."""
    root = nn.Module()
    # Block 10 after block 9, as a model has them.
    for name in sorted(tensors, key=_in_order):
        *path, leaf = name.split(".")
        owner = root
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner._modules[part]
        owner.register_buffer(leaf, tensors[name])
    return root


def _in_order(name: str) -> list[tuple[int, str]]:
    return [(int(part) if part.isdigit() else -1, part) for part in name.split(".")]
