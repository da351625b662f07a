"""Whether vectors belong to a model: shapes, and a digest of the quantized weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..errors import BiasCompensationError
from ..models.blocks import find_block_lists
from ..models.modules import plain_part, stored_tensors
from ..names import KEY
from .contents import Contents

SAMPLES = 1024  # values read per tensor: a requantized weight differs in a large share of them


def _weights(module: nn.Module) -> dict[str, Tensor]:
    """The largest stored matrix of every submodule that has one: its weight, packed or not."""
    largest: dict[str, Tensor] = {}
    for name, tensor in stored_tensors(module):
        owner, _, leaf = name.rpartition(".")
        if tensor.dim() < 2 or leaf == KEY:
            continue
        if owner not in largest or tensor.nbytes > largest[owner].nbytes:
            largest[owner] = tensor
    return largest


def _holders(lists: list[str], sites: Iterable[str]) -> list[str]:
    """Paths of what holds the weights that vectors belong to."""
    inside = tuple(f"{path}." for path in lists)
    return lists + sorted(name for name in sites if not name.startswith(inside))


def weights_digest(model: nn.Module, lists: Iterable[str], sites: Iterable[str] = ()) -> str:
    """BLAKE2b over names, shapes and evenly spaced values of the weights that vectors belong to.

    Packed integer weights are stored alike by every loader, so where there are any only those
    count; floating ones may be cast on the way.

    Args:
        lists: Paths of the lists of blocks.
        sites: Names of the sites with vectors.
    """
    digest = hashlib.blake2b(digest_size=16)
    for path in _holders(list(lists), sites):
        weights = _weights(model.get_submodule(path))
        packed = {name: w for name, w in weights.items() if not w.is_floating_point()}
        for name, weight in sorted((packed or weights).items()):
            flat = plain_part(weight.detach()).reshape(-1)
            step = max(1, flat.numel() // SAMPLES)
            sample = flat[::step].contiguous().cpu().view(torch.uint8)
            digest.update(f"{name} {tuple(weight.shape)}".encode())
            digest.update(sample.numpy().tobytes())
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
        width = "out_channels" if convolution else "out_features"
        expected = (rows, getattr(modules[name], width, vectors.shape[-1]))
        if tuple(vectors.shape) != expected:
            raise BiasCompensationError(
                f"{name}.{KEY} has shape {tuple(vectors.shape)}, expected {expected}; "
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
