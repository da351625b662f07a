"""How good a quantized model is: perplexity, and how far it is from the float model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from tqdm.auto import tqdm

from .errors import BiasCompensationError
from .models.predictions import next_token_log_probabilities, predicted_tokens


@dataclass(frozen=True)
class Evaluation:
    """What ``evaluate`` measured.

    Attributes:
        perplexity: exp of the mean negative log-likelihood of the next token.
        tokens: Number of tokens predicted.
        kl: Mean KL divergence, in nats, of the next-token distribution from the reference's.
        top1: Share of tokens for which the most likely next token is the reference's.
    """

    perplexity: float
    tokens: int
    kl: float | None = None
    top1: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Mapping[str, torch.Tensor]],
    reference: nn.Module | None = None,
) -> Evaluation:
    """Measure a causal language model.

    Args:
        model: Returns ``logits`` when called with a batch.
        batches: ``{"input_ids", "attention_mask"}``, int64 of shape (batch, length).
        reference: The float model; without one, ``kl`` and ``top1`` are None.

    Raises:
        BiasCompensationError: no token is left to predict, or the loss is not finite.
    """
    loss = divergence = 0.0
    tokens = agreeing = 0
    for batch in tqdm(list(batches), desc="Evaluating", leave=False):
        log_p = next_token_log_probabilities(model, batch)
        targets = batch["input_ids"][:, 1:][predicted_tokens(batch)].to(log_p.device)
        loss += functional.nll_loss(log_p, targets, reduction="sum").double().item()
        tokens += len(targets)
        if reference is not None:
            log_q = next_token_log_probabilities(reference, batch).to(log_p.device)
            divergence += functional.kl_div(log_p, log_q, reduction="sum", log_target=True).item()
            agreeing += (log_p.argmax(-1) == log_q.argmax(-1)).sum().item()
    if tokens == 0:
        raise BiasCompensationError("there is no token to predict; give longer sequences.")
    if not math.isfinite(loss):
        raise BiasCompensationError("the loss is not finite; try bfloat16 or float32.")
    perplexity = math.exp(loss / tokens)
    if reference is None:
        return Evaluation(perplexity, tokens)
    return Evaluation(perplexity, tokens, divergence / tokens, agreeing / tokens)
