"""The tokens of one call of a model: which row of its table each uses.

A site gives the call's own tokens, but for one that expands what a cache holds: multi-head latent
attention caches compressed keys and values, and expands those of all tokens at every step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import BiasCompensationError
from .masks import attended, index_among
from .positions import (
    CACHES,
    are_tokens,
    is_packed,
    past_length,
    vector_rows,
)

WINDOWS = ", as in windowed or cross-attention"


@dataclass(frozen=True)
class Surroundings:
    """What a call tells of the tokens before its own.

    Attributes:
        cached: How many the cache holds; None without one, or where it does not tell.
        mask: The model's attention mask, over all tokens.
        context: Whether the blocks attend to other tokens beside these.
        kept: How many of its last tokens the call is asked for; None for all.
    """

    cached: int | Tensor | None = None
    mask: Any = None
    context: bool = False
    kept: int | None = None

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Surroundings:
        """Those of a call; read before it begins, since it adds its tokens to the cache.

        Args:
            arguments: What the module that holds the blocks is called with, by name.
        """
        has_cache = any(arguments.get(name) is not None for name in CACHES)
        # The cache of several sequences at once gives their tokens in an order of its own.
        cached = past_length(arguments) if has_cache and not is_packed(arguments) else None
        kept = arguments.get("logits_to_keep")
        return cls(
            cached.clone() if isinstance(cached, Tensor) else cached,  # a cache counts in place
            arguments.get("attention_mask"),
            arguments.get("encoder_hidden_states") is not None,
            kept if isinstance(kept, int) else None,
        )


ALONE = Surroundings()


@dataclass(frozen=True)
class CallTokens:
    """The tokens of a call.

    Attributes:
        rows: Of each, (batch, length); None where all use the last row.
        shape: (batch, length).
        positions: Number of leading positions with a row of their own.
        around: What is known of the tokens before these.
    """

    rows: Tensor | None
    shape: torch.Size
    positions: int
    around: Surroundings = ALONE

    def rows_of(self, hidden: Tensor) -> Tensor | None:
        """The rows of the tokens of ``hidden``, (..., features), laid out like them.

        Returns:
            None where all use the last row.

        Raises:
            BiasCompensationError: they are tokens whose positions are unknown.
        """
        count = self.shape[0] * self.shape[1]
        if hidden.numel() == count * hidden.shape[-1]:
            return None if self.rows is None else rows_of(self.rows, hidden)
        return self._others(hidden)

    def _others(self, hidden: Tensor) -> Tensor | None:
        (batch, length), given, around = self.shape, hidden.shape[:-1], self.around
        last = given[-1]
        if given[0] == batch and given.numel() == batch * last and not around.context:
            if last == around.kept and last < length:  # Gemma 4's last layers run on these alone
                return None if self.rows is None else rows_of(self.rows[:, -last:], hidden)
            if around.cached is not None and last > length:
                return self._of_cached(hidden, around.cached + length)
        raise _other_tokens(given, self.shape, WINDOWS)

    def _of_cached(self, hidden: Tensor, seen: int | Tensor) -> Tensor:
        """The rows of all tokens that the cache gives.

        It gives the newest last; one of a fixed size has places behind them that nothing attends
        to, and one for a sliding window has forgotten the first.
        """
        given, device = hidden.shape[:-1], hidden.device
        forgotten = seen - given[-1]
        if isinstance(forgotten, Tensor):
            forgotten = forgotten.to(device).clamp(min=0)
        else:
            forgotten = max(forgotten, 0)
        index = (torch.arange(given[-1], device=device) + forgotten)[None]
        real = self._real(hidden)
        if real is not None:
            index = index_among(real)[:, index[0].clamp(max=real.shape[-1] - 1)]
        return vector_rows(index, self.positions).expand(given[0], -1).reshape(given)

    def _real(self, hidden: Tensor) -> Tensor | None:
        """Which of all tokens are no padding, (batch, tokens)."""
        mask = self.around.mask
        if isinstance(mask, Mapping):  # one mask per kind of layer
            mask = mask.get("full_attention")
            if mask is None and any(other is not None for other in self.around.mask.values()):
                raise _other_tokens(hidden.shape[:-1], self.shape, " behind a mask of windows")
        if mask is None:
            return None
        if mask.dim() == 4:
            mask = attended(mask).any(-2)
        return mask.to(hidden.device) != 0


def rows_of(rows: Tensor, hidden: Tensor) -> Tensor:
    """``rows``, (batch, length), laid out like the tokens of ``hidden``, which may be flattened.

    Raises:
        BiasCompensationError: ``hidden`` holds other tokens, or the same in windows.
    """
    tokens = hidden.shape[:-1]
    if not are_tokens(tokens, rows):
        raise _other_tokens(tokens, rows.shape, WINDOWS)
    return rows.to(hidden.device).reshape(tokens)


def _other_tokens(given: torch.Size, shape: torch.Size, why: str) -> BiasCompensationError:
    """The error for a site of a running model that gives tokens of shape ``given``, not its own."""
    return BiasCompensationError(
        f"a site gives tokens of shape {tuple(given)} where the model has {tuple(shape)}{why}, so "
        "their positions are unknown; compensate with positions=0."
    )
