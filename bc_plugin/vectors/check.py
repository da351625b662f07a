"""Whether vectors belong to a model: shapes, and a digest of the quantized weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..errors import BiasCompensationError
from ..models.blocks import find_block_lists
from ..models.modules import plain_part, stored_tensors
from ..models.offloaded import stored_value
from ..names import KEY
from .contents import Contents
from .fingerprint import fingerprint


def _weights(module: nn.Module) -> dict[str, tuple[str, Tensor]]:
    """The largest stored matrix of every submodule that has one: its weight, packed or not."""
    largest: dict[str, tuple[str, Tensor]] = {}
    for name, tensor in stored_tensors(module):
        owner, _, leaf = name.rpartition(".")
        if tensor.dim() < 2 or leaf == KEY:
            continue
        if owner not in largest or tensor.nbytes > largest[owner][1].nbytes:
            largest[owner] = name, tensor
    return largest


def _holders(lists: list[str], sites: Iterable[str]) -> list[str]:
    """Paths of what holds the weights that vectors belong to."""
    inside = tuple(f"{path}." for path in lists)
    return lists + sorted(name for name in sites if not name.startswith(inside))


def weights_digest(model: nn.Module, lists: Iterable[str], sites: Iterable[str] = ()) -> str:
    """BLAKE2b over names, shapes and all bytes of the weights that vectors belong to.

    Packed integer weights are stored alike by every loader, so where there are any only those
    count; floating ones may be cast on the way.

    Args:
        lists: Paths of the lists of blocks.
        sites: Names of the sites with vectors.

    Raises:
        BiasCompensationError: some of these weights are offloaded, and not by accelerate.
    """
    digest = hashlib.blake2b(digest_size=16)
    for path in _holders(list(lists), sites):
        weights = _weights(model.get_submodule(path))
        packed = {n: found for n, found in weights.items() if not found[1].is_floating_point()}
        for name, (stored, weight) in sorted((packed or weights).items()):
            value = plain_part(stored_value(model, f"{path}.{stored}"))
            digest.update(f"{name} {tuple(weight.shape)} {fingerprint(value)}".encode())
    return digest.hexdigest()


def check(compensation: Contents, model: nn.Module) -> None:
    """See ``Compensation.check``."""
    modules = dict(model.named_modules())
    for name, vectors in compensation.vectors.items():
        if name not in modules:
            raise BiasCompensationError(
                f"there is no module {name!r} in {type(model).__name__}; "
                "these vectors belong to another model."
            )
        convolution = compensation.kinds[name] == "convolution"
        rows = len(vectors) if convolution else compensation.positions + 1
        widths = _widths(modules[name], "out_channels" if convolution else "out_features")
        if vectors.dim() != 2 or len(vectors) != rows or vectors.shape[1] not in widths:
            shapes = " or ".join(str((rows, width)) for width in sorted(widths))
            raise BiasCompensationError(
                f"{name}.{KEY} has shape {tuple(vectors.shape)}, expected {shapes}; "
                "these vectors belong to another model or to other positions."
            )
        if not bool(torch.isfinite(vectors).all()):
            raise BiasCompensationError(
                f"{name}.{KEY} holds NaN or infinity; the file is damaged, compute the "
                "compensation again."
            )
    lists = [blocks.path for blocks in find_block_lists(model, compensation.blocks)]
    digest = weights_digest(model, lists, compensation.vectors)
    if digest != compensation.digest:
        raise BiasCompensationError(
            f"the vectors were computed for quantized weights with digest {compensation.digest}; "
            f"this model's weights have {digest}. Load the checkpoint they were saved with, or "
            "compute them again with bc_plugin.compensate. (Some kernels repack their weights "
            "when first run: attach before running the model.)"
        )


def _widths(module: nn.Module, attribute: str) -> set[int]:
    """How many features a site may give; a block, those of anything within."""
    own = getattr(module, attribute, None)
    if own is not None:
        return {own}
    found = {getattr(child, attribute, 0) for child in module.modules()}
    return (found | {tensor.shape[-1] for _, tensor in stored_tensors(module) if tensor.dim()}) - {
        0
    }
