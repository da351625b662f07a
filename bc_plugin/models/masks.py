"""What attention masks tell of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import BiasCompensationError


def attended(mask: Tensor) -> Tensor:
    """Which keys each query attends to, bool (batch, query, key).

    Args:
        mask: (batch, heads, query, key), True or 0 where attended.
    """
    return (mask if mask.dtype == torch.bool else mask == 0)[:, 0]


def index_among(real: Tensor) -> Tensor:
    """The index of each token among the real ones, -1 for others; both (batch, tokens)."""
    # Not of booleans, which ONNX cannot sum up.
    return (real.to(torch.int64).cumsum(-1) - 1).masked_fill(~real, -1)


def index_from_mask(mask: Any, length: int, past: int | Tensor) -> Tensor | None:
    """Index of each token in its sequence, -1 for padding, from a 2D or 4D attention mask."""
    if isinstance(mask, Mapping):  # one mask per kind of layer
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if not isinstance(mask, Tensor):
        return None
    if mask.dim() == 2:
        columns = torch.arange(length, device=mask.device) + past
        if mask.shape[1] < length:
            raise BiasCompensationError(
                f"attention_mask has {mask.shape[1]} columns for {length} tokens; expected one "
                "column per token, past tokens included."
            )
        return index_among(mask != 0)[:, columns.clamp(max=mask.shape[1] - 1)]
    if mask.dim() == 4:
        seen = attended(mask)
        columns = torch.arange(length, device=mask.device) + past
        keys = torch.arange(seen.shape[-1], device=mask.device)
        # Encoders attend to later tokens, too, and padding attends to what it is not part of.
        index = (seen & (keys <= columns[:, None])).to(torch.int64).sum(-1) - 1
        real = seen.any(-2)[:, columns.clamp(max=len(keys) - 1)]
        return index.masked_fill(~real, -1)
    return None
