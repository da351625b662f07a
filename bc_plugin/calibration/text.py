"""Text, cut into windows of tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import BiasCompensationError


def start_of_text(tokenizer: Any) -> list[int]:
    """The tokens that a tokenizer puts in front of every text, such as Gemma's BOS; often none."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    added = len(whole) - len(bare)
    return next((whole[:n] for n in range(added + 1) if whole[n:][: len(bare)] == bare), [])


def windows(
    text: str, tokenizer: Any, length: int, count: int | None = None, skip: int = 0
) -> list[dict[str, Tensor]]:
    """Cut ``text`` into consecutive windows of ``length`` tokens.

    Each starts as the tokenizer starts a text: a model that always sees a BOS takes that for its
    attention sink, and is another model without it.

    Args:
        tokenizer: A transformers tokenizer.
        count: At most so many windows; None for all.
        skip: Windows to leave out at the start.

    Returns:
        One ``{"input_ids", "attention_mask"}`` per window, each int64 of shape (1, length).

    Raises:
        BiasCompensationError: the text is shorter than one window, or a window is too short for
            any of it.
    """
    start = start_of_text(tokenizer)
    room = length - len(start)
    if room < 1:
        raise BiasCompensationError(
            f"windows of {length} tokens have no room for text: the tokenizer starts every text "
            f"with {len(start)}. Use longer windows."
        )
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False)
    ids = ids["input_ids"][0]
    rows = ids[: len(ids) // room * room].view(-1, 1, room)[skip:][:count]
    if len(rows) == 0:
        raise BiasCompensationError(
            f"the text has {len(ids)} tokens; {skip} windows to skip and one to keep need "
            f"{(skip + 1) * room}. Use a longer text, or shorter windows (--length)."
        )
    rows = [torch.cat([torch.tensor([start], dtype=row.dtype), row], dim=1) for row in rows]
    return [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]
