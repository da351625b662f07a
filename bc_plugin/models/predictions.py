"""What a language model predicts for the next token."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from .modules import device_of


def next_token_log_probabilities(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> Tensor:
    """What ``model`` predicts for each next token that counts, float32 (tokens, vocabulary)."""
    device = device_of(model)
    logits = model(**{key: value.to(device) for key, value in batch.items()}).logits
    predicted = predicted_tokens(batch).to(logits.device)
    return functional.log_softmax(logits[:, :-1][predicted].float(), dim=-1)


def predicted_tokens(batch: Mapping[str, torch.Tensor]) -> Tensor:
    """Which next tokens count, (batch, length - 1): real ones predicted from real ones."""
    ids = batch["input_ids"]
    mask = batch.get("attention_mask", torch.ones_like(ids)).bool()
    return mask[:, 1:] & mask[:, :-1]


def predicting_rows(batch: Mapping[str, torch.Tensor]) -> Tensor:
    """Rows of flattened logits that predict a token that counts, int64 (tokens,)."""
    counts = functional.pad(predicted_tokens(batch), (0, 1))  # the last one predicts none
    return counts.flatten().nonzero().squeeze(-1)
