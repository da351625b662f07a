"""Which tokens lead their sequence.

The first token of a sequence is an attention sink whose activations are hundreds of times larger
than the rest, so it has a vector of its own. This module finds it in whatever a model is called
with: padding on either side, a cache, packed sequences.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BiasCompensationError
from .masks import attended, index_from_mask

INPUTS = ("input_ids", "inputs_embeds", "hidden_states")
CACHES = ("past_key_values", "cache_params", "state")


@functools.cache
def parameter_names(kind: type[nn.Module]) -> tuple[str, ...]:
    """The names of what the forward of a kind of module takes, in order, without ``self``."""
    parameters = inspect.signature(kind.forward).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(p.name for p in parameters if p.kind in positional)[1:]


def call_arguments(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of ``module``, by name."""
    return {**dict(zip(parameter_names(type(module)), args, strict=False)), **kwargs}


def first_input(args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
    """The hidden states that a block is called with."""
    if args:
        return args[0]
    if "hidden_states" in kwargs:
        return kwargs["hidden_states"]
    return next(value for value in kwargs.values() if isinstance(value, Tensor))


def past_length(arguments: Mapping[str, Any]) -> int | Tensor | None:
    """Tokens that the cache holds; None where there are some, and it cannot tell how many."""
    for name in CACHES:
        cache = arguments.get(name)
        if cache is None:
            continue
        try:
            return cache.get_seq_length()
        except (AttributeError, ValueError):  # it holds states and no keys
            pass
        previous = getattr(cache, "has_previous_state", None)
        if previous is None or previous():
            return None
    return 0


def is_packed(arguments: Mapping[str, Any]) -> bool:
    """Whether a call says where its sequences begin, one behind the other, without padding.

    So does continuous batching, whose masks have the tokens of a cache in an order of its own.
    """
    return arguments.get("cu_seq_lens_q") is not None and arguments.get("position_ids") is not None


def context_index(arguments: Mapping[str, Any]) -> Tensor | None:
    """Index of every token that a block attends to beside its own, as a decoder to its encoder's.

    Args:
        arguments: What the block was called with, by name.

    Returns:
        int64 of shape (batch, length), -1 for padding; None where there are no such tokens.
    """
    context, mask = (arguments.get(f"encoder_{x}") for x in ("hidden_states", "attention_mask"))
    if context is None:
        return None
    if mask is None:
        return plain_index(context)
    if mask.dim() == 4:
        mask = attended(mask).any(1)
    index = index_from_mask(mask, context.shape[1], 0)
    return index.expand(context.shape[:2])


def plain_index(hidden: Tensor) -> Tensor:
    """Token indices of hidden states (batch, length, features) without padding or cache."""
    batch, length = hidden.shape[:2]
    return torch.arange(length, device=hidden.device).expand(batch, length)


def token_index(arguments: Mapping[str, Any]) -> Tensor | None:
    """Index of every token in its own sequence.

    Args:
        arguments: What the model, or the module that holds its blocks, was called with, by name.

    Returns:
        int64 of shape (batch, length); 0 is the first token that is not padding, -1 is padding.
        None where no argument has tokens, as with images: the blocks' input then tells.

    A padded row starts at its first unmasked token, whatever ``position_ids`` say; a packed row
    starts anew wherever ``position_ids`` do. Where both are given the smaller index is right.

    Raises:
        BiasCompensationError: there are tokens before these, and nothing tells how many.
    """
    return _index(arguments, past_length(arguments))


def running_index(arguments: Mapping[str, Any], positions: int) -> Tensor | None:
    """``token_index`` for a model that has vectors for so many leading positions.

    State-space models have caches that do not tell how many tokens they have seen. For one leading
    position it is enough that there were any.
    """
    past = past_length(arguments)
    return _index(arguments, 1 if past is None and positions == 1 else past)


def _index(arguments: Mapping[str, Any], past: int | Tensor | None) -> Tensor | None:
    inputs = next((arguments[name] for name in INPUTS if arguments.get(name) is not None), None)
    if inputs is None:
        return None
    batch, length = inputs.shape[:2]
    ids, mask = arguments.get("position_ids"), arguments.get("attention_mask")
    if ids is None:
        ids = arguments.get("cache_position")
    if past is None:
        raise BiasCompensationError(
            "the model is called with a cache that does not tell how many tokens it has seen, so "
            "the positions of the next ones are unknown; compensate with positions=1 or 0, or "
            "call it with use_cache=False."
        )
    if ids is None:
        ids = torch.arange(length, device=inputs.device) + past
    if ids.dim() == 3:  # multimodal rotary positions: (axes, batch, length)
        ids = ids[0]
    index = ids.to(torch.int64).expand(batch, length)
    if is_packed(arguments):
        return index
    by_mask = index_from_mask(mask, length, past)
    if by_mask is not None:
        index = torch.minimum(index, by_mask.to(index.device).expand(batch, length))
    return index


def vector_rows(index: Tensor, positions: int) -> Tensor:
    """The row of a ``(positions + 1, features)`` table that each token uses; the last is shared."""
    return index.masked_fill(index < 0, positions).clamp(max=positions)


def are_tokens(shape: torch.Size, tokens: Tensor) -> bool:
    """Whether values of ``shape`` are those of ``tokens``, (batch, length), in the same order.

    They may be flattened, or have one head as in multi-head latent attention: (batch, 1, length).
    """
    if shape in (tokens.shape, (tokens.numel(),)):
        return True
    return [n for n in shape if n != 1] == [n for n in tokens.shape if n != 1]


def site_index(
    name: str, positions: int, tokens: torch.Size, own: Tensor, context: Tensor | None
) -> Tensor:
    """The index of every token that a site within a block gives while it is measured.

    Args:
        name: The site's, for errors.
        positions: Number of leading positions with a vector of their own.
        tokens: Shape of what it gives, without the features.
        own, context: Indices of the block's own tokens, and of those it attends to beside them.

    Raises:
        BiasCompensationError: they are other tokens, so that their positions, or which of them
            are padding, are unknown.
    """
    if positions and len(tokens) == 2 and tokens != own.shape and tokens == own.shape[::-1]:
        raise BiasCompensationError(
            f"{name} gives tokens of shape {tuple(tokens)}, sequence after sequence in the last "
            "dimension, so those of several would be mixed up. Compensate with positions=0."
        )
    if are_tokens(tokens, own):
        if context is not None and own.shape == context.shape:
            _require_equal(name, positions, own, context)
        return own
    if positions:
        raise BiasCompensationError(
            f"{name} gives tokens of shape {tuple(tokens)} where its block has "
            f"{tuple(own.shape)}, as in windowed or cross-attention, so their positions are "
            "unknown. Compensate with positions=0, or only blocks with sites='block'."
        )
    if context is not None and tokens == context.shape:
        return context
    # Windows, or a table of relative positions (Swin v2). A single dimension holds the tokens
    # routed to an expert, which are others in the quantized model.
    if len(tokens) > 1 and not bool((own < 0).any()):
        return torch.zeros(tokens, dtype=torch.int64, device=own.device)
    raise BiasCompensationError(
        f"expected outputs of shape {tuple(own.shape)} + (features,) from {name}; it "
        f"gives {tuple(tokens)} + (features,), of which it is unknown what is padding."
    )


def _require_equal(name: str, positions: int, own: Tensor, context: Tensor) -> None:
    rows = [vector_rows(index, positions) for index in (own, context)]
    if not torch.equal(*rows) or not torch.equal(own < 0, context < 0):
        raise BiasCompensationError(
            f"{name}: as many tokens are attended to across as there are, but padded "
            "differently, so whose tokens a site gives is unknown. Calibrate without padding."
        )
