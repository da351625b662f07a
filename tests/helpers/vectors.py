"""A quantized model with vectors for it."""

from __future__ import annotations

import torch

import bc_plugin

from .language import crudely_quantized, tiny_model, token_batches


def pair(architecture="llama", positions=1, **changes):
    """A quantized model, and what compensates it, not attached yet."""
    model = tiny_model(architecture, **changes)
    quantized = crudely_quantized(model)
    return quantized, bc_plugin.compensate(
        quantized, model, token_batches(), {"positions": positions}
    )


def compensated(model, positions=1, **config):
    """A quantized model with its vectors, the leading ones so large that a wrong row is seen."""
    quantized = crudely_quantized(model)
    config = {"positions": positions, "held_out": 0, **config}
    compensation = bc_plugin.compensate(quantized, model, token_batches(), config)
    for vectors in compensation.vectors.values():
        vectors[:-1] += 0.5 * torch.randn(vectors[:-1].shape).to(vectors.dtype)
    compensation.attach(quantized)
    return quantized


@torch.no_grad()
def logits(model):
    """For a sequence that no vector was fitted to."""
    return model(**token_batches(1, seed=3)[0]).logits
