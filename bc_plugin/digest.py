"""A digest that binds vectors to the quantized weights they were computed for."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from .names import VECTOR
from .structure import Blocks, stored_tensors

SAMPLES = 1024  # values read per tensor: a requantized weight differs in a large share of them


def _weights(module: nn.Module) -> dict[str, Tensor]:
    """The largest stored matrix of every submodule that has one: its weight, packed or not."""
    largest: dict[str, Tensor] = {}
    for name, tensor in stored_tensors(module):
        owner, _, leaf = name.rpartition(".")
        if tensor.dim() < 2 or leaf == VECTOR:
            continue
        if owner not in largest or tensor.nbytes > largest[owner].nbytes:
            largest[owner] = tensor
    return largest


def weights_digest(model: nn.Module, blocks: Blocks) -> str:
    """BLAKE2b over names, shapes and evenly spaced values of the weights inside the blocks.

    Packed integer weights are stored alike by every loader, so where there are any only those
    count; floating ones may be cast on the way.
    """
    weights = _weights(model.get_submodule(blocks.path))
    packed = {name: w for name, w in weights.items() if not w.is_floating_point()}
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in sorted((packed or weights).items()):
        flat = weight.detach().reshape(-1)
        step = max(1, flat.numel() // SAMPLES)
        sample = flat[::step].contiguous().cpu().view(torch.uint8)
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()
