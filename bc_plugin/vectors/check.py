"""A digest that binds vectors to the quantized weights they were computed for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..models.modules import stored_tensors
from ..names import KEY

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


def weights_of(lists: Iterable[str], sites: Iterable[str]) -> list[str]:
    """Paths of what holds the weights that vectors belong to.

    Args:
        lists: Paths of the lists of blocks.
        sites: Names of the sites with vectors.
    """
    lists = list(lists)
    inside = tuple(f"{path}." for path in lists)
    return lists + sorted(name for name in sites if not name.startswith(inside))


def weights_digest(model: nn.Module, paths: Iterable[str]) -> str:
    """BLAKE2b over names, shapes and evenly spaced values of the weights inside some modules.

    Packed integer weights are stored alike by every loader, so where there are any only those
    count; floating ones may be cast on the way.

    Args:
        paths: As ``weights_of`` gives them.
    """
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        weights = _weights(model.get_submodule(path))
        packed = {name: w for name, w in weights.items() if not w.is_floating_point()}
        for name, weight in sorted((packed or weights).items()):
            flat = weight.detach().reshape(-1)
            step = max(1, flat.numel() // SAMPLES)
            sample = flat[::step].contiguous().cpu().view(torch.uint8)
            digest.update(f"{name} {tuple(weight.shape)}".encode())
            digest.update(sample.numpy().tobytes())
    return digest.hexdigest()
