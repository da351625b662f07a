"""What blocks are called with, moved to where it is needed and safe from what they do to it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BiasCompensationError


def moved(
    value: Any, device: torch.device, dtype: torch.dtype | None, lasting: bool = False
) -> Any:
    """``value``, a tensor or whatever holds some, on ``device`` and its floats in ``dtype``.

    Layers that share keys and values hand them on in a mapping that each of them writes to, so a
    block is given a copy of every list and mapping.

    Args:
        dtype: None for the type they have.
        lasting: Give the lists and mappings themselves, for later blocks to find what was written.
    """
    if isinstance(value, Tensor):
        return _moved_tensor(value, device, dtype)
    if isinstance(value, tuple):
        items = [moved(item, device, dtype, lasting) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if not isinstance(value, (list, MutableMapping)):
        return value
    own = value if lasting else copy.copy(value)
    for key in range(len(own)) if isinstance(own, list) else list(own):
        own[key] = moved(own[key], device, dtype, lasting)
    return own


def _moved_tensor(value: Tensor, device: torch.device, dtype: torch.dtype | None) -> Tensor:
    if dtype is None or dtype == value.dtype or not value.is_floating_point():
        return value.to(device)
    # In masks the smallest number of a type stands for minus infinity, yet must not become it:
    # padding attends to nothing else, and a softmax over nothing is not a number.
    smallest = value == torch.finfo(value.dtype).min
    return value.to(device, dtype).masked_fill_(smallest.to(device), torch.finfo(dtype).min)


def hidden_states(name: str, args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
    """The hidden states among a block's arguments: the first, or the one of that name.

    Raises:
        BiasCompensationError: there are none.
    """
    given = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(given, Tensor):
        raise BiasCompensationError(
            f"{name} is not called with hidden states: its first argument is a "
            f"{type(given).__name__}, and none is called hidden_states. Such blocks cannot be "
            "compensated; name others with blocks=..."
        )
    return given


def hidden_output(block: nn.Module, output: Any) -> Tensor:
    """The hidden states among what ``block`` returns: that itself, or the first of several.

    Raises:
        BiasCompensationError: there are none.
    """
    hidden = output[0] if isinstance(output, (tuple, list)) and len(output) > 0 else output
    if not isinstance(hidden, Tensor):
        raise BiasCompensationError(
            f"a {type(block).__name__} returns a {type(output).__name__}, in which hidden states "
            "are expected first. Such blocks cannot be compensated; name others with blocks=..."
        )
    return hidden


def with_hidden(output: Any, hidden: Tensor) -> Any:
    """What a block returned, several things, with other hidden states."""
    values, kind = (hidden, *output[1:]), type(output)
    return kind(*values) if hasattr(kind, "_fields") else kind(values)
