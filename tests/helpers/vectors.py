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


@torch.no_grad()
def logits(model):
    """For a sequence that no vector was fitted to."""
    return model(**token_batches(1, seed=3)[0]).logits
