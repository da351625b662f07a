"""KL divergence from recorded distributions, with its gradient worked out beside it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

VALUES = 1 << 22  # of logits at once, so that they stay in a processor's cache


class Divergence(torch.autograd.Function):
    """``sum p (log p - log q)``, the values that were not recorded taken as one outcome.

    Autograd would go a dozen times over logits of (tokens, vocabulary), which takes as long as the
    head itself. The gradient is closed: ``q_j - p_j`` for a value that was recorded, and
    ``q_j (1 - p_rest / q_rest)`` for the others.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, rows: Tensor, log_p: Tensor, index: Tensor) -> Tensor:
        """The divergence in nats, summed over tokens.

        Args:
            logits: (..., vocabulary), any type; worked on in float32.
            rows: Which of them count, int64 (tokens,), in the order of what was recorded.
            log_p: The largest log-probabilities of each token, float32 (tokens, top_k).
            index: The values that they are of, int64 (tokens, top_k).
        """
        flat = logits.reshape(-1, logits.shape[-1])
        gradient = torch.zeros_like(flat) if ctx.needs_input_grad[0] else None
        total = log_p.new_zeros((), dtype=torch.float64)
        step = max(1, VALUES // flat.shape[-1])
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            found, by_logits = _of(flat[rows[part]].float(), log_p[part], index[part])
            total += found
            if gradient is not None:
                gradient[rows[part]] = by_logits.to(gradient.dtype)
        ctx.gradient, ctx.shape = gradient, logits.shape
        return total.to(log_p.dtype)

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.gradient.mul_(factor).view(ctx.shape), None, None, None


def _of(logits: Tensor, log_p: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Divergence and gradient of some tokens; ``logits`` are overwritten."""
    log_q = logits.sub_(logits.logsumexp(-1, keepdim=True))
    chosen, p = log_q.gather(-1, index), log_p.exp()
    total = (p * (log_p - chosen)).sum(dtype=torch.float64)
    gradient = log_q.exp_()
    if index.shape[-1] < logits.shape[-1]:
        rest_p, rest_q = _rest(p), _rest(chosen.exp())
        total += (rest_p * (rest_p.log() - rest_q.log())).sum(dtype=torch.float64)
        gradient.mul_((1 - rest_p / rest_q)[:, None])
    return total, gradient.scatter_(-1, index, chosen.exp() - p)


def _rest(probabilities: Tensor) -> Tensor:
    """The mass that is not among ``probabilities``, (tokens,)."""
    return (1 - probabilities.sum(-1)).clamp(min=torch.finfo(torch.float32).eps)
