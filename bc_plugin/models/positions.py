"""Which tokens lead their sequence.

The first token of a sequence is an attention sink whose activations are hundreds of times larger
than the rest, so it has a vector of its own. This module finds it in whatever a model is called
with: padding on either side, a cache, packed sequences.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BiasCompensationError

INPUTS = ("input_ids", "inputs_embeds", "hidden_states")


def call_arguments(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of ``module``, by name."""
    signature = inspect.signature(type(module).forward)
    named = signature.bind_partial(module, *args, **kwargs).arguments
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            named |= named.pop(parameter.name, {})
    return named


def _past_length(arguments: Mapping[str, Any]) -> int | Tensor:
    cache = arguments.get("past_key_values")
    return cache.get_seq_length() if hasattr(cache, "get_seq_length") else 0


def _from_mask(mask: Any, length: int, past: int | Tensor) -> Tensor | None:
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
        real = mask != 0
        index = (real.cumsum(-1) - 1).masked_fill(~real, -1)
        return index[:, columns.clamp(max=mask.shape[1] - 1)]
    if mask.dim() == 4:  # (batch, heads, query, key), True or 0 where attended
        seen = (mask if mask.dtype == torch.bool else mask == 0)[:, 0]
        columns = torch.arange(length, device=mask.device) + past
        keys = torch.arange(seen.shape[-1], device=mask.device)
        # Encoders attend to later tokens, too, and padding attends to what it is not part of.
        index = (seen & (keys <= columns[:, None])).to(torch.int64).sum(-1) - 1
        real = seen.any(-2)[:, columns.clamp(max=len(keys) - 1)]
        return index.masked_fill(~real, -1)
    return None


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
    if mask.dim() == 4:  # (batch, heads, query, key), as in ``_from_mask``
        mask = (mask if mask.dtype == torch.bool else mask == 0)[:, 0].any(1)
    index = _from_mask(mask, context.shape[1], 0)
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
    """
    inputs = next((arguments[name] for name in INPUTS if arguments.get(name) is not None), None)
    if inputs is None:
        return None
    batch, length = inputs.shape[:2]
    past = _past_length(arguments)
    ids = arguments.get("position_ids")
    if ids is None:
        ids = arguments.get("cache_position")
    if ids is None:
        ids = torch.arange(length, device=inputs.device) + past
    if ids.dim() == 3:  # multimodal rotary positions: (axes, batch, length)
        ids = ids[0]
    index = ids.to(torch.int64).expand(batch, length)
    by_mask = _from_mask(arguments.get("attention_mask"), length, past)
    if by_mask is not None:
        index = torch.minimum(index, by_mask.to(index.device).expand(batch, length))
    return index


def vector_rows(index: Tensor, positions: int) -> Tensor:
    """The row of a ``(positions + 1, features)`` table that each token uses; the last is shared."""
    return index.masked_fill(index < 0, positions).clamp(max=positions)


def rows_of(rows: Tensor, hidden: Tensor) -> Tensor:
    """``rows``, (batch, length), laid out like the tokens of ``hidden``, which may be flattened.

    Raises:
        BiasCompensationError: ``hidden`` holds other tokens, or the same in windows.
    """
    tokens = hidden.shape[:-1]
    if tokens != rows.shape and tokens != (rows.numel(),):
        raise BiasCompensationError(
            f"a site gives tokens of shape {tuple(tokens)} where the model has "
            f"{tuple(rows.shape)}, as in windowed or cross-attention, so their positions are "
            "unknown; compensate with positions=0."
        )
    return rows.to(hidden.device).reshape(tokens)


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
    if tokens == own.shape or tokens == (own.numel(),):
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


class PositionTracker:
    """Knows, while a model runs, which row of the table each token uses.

    One tracker serves all sites of a model. It listens to the module that holds the blocks, and
    keeps what it saw last, so that blocks recomputed by gradient checkpointing find it too.
    """

    def __init__(self, positions: int) -> None:
        self.positions = positions
        self.rows: Tensor | None = None
        self.waiting = False

    def listen(self, owner: nn.Module, first_block: nn.Module) -> list[Any]:
        """Follow every forward pass of a model from now on; returns the hooks' handles."""
        if self.positions == 0:
            return []
        return [
            owner.register_forward_pre_hook(self.before_forward, with_kwargs=True),
            first_block.register_forward_pre_hook(self.before_first_block, with_kwargs=True),
        ]

    def observe(self, index: Tensor) -> None:
        """Take the token indices of the batch about to run."""
        rows = vector_rows(index, self.positions)
        # Decoding needs only the shared row. Under torch.compile the branch would break the graph.
        if not torch.compiler.is_compiling() and not bool((rows < self.positions).any()):
            self.rows = None
        else:
            self.rows = rows

    def before_forward(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook for the module that holds the blocks."""
        index = token_index(call_arguments(module, args, kwargs))
        self.waiting = index is None
        if index is not None:
            self.observe(index)

    def before_first_block(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook for the first block, where no argument of the model has tokens."""
        if self.waiting:
            self.observe(plain_index(args[0] if args else kwargs["hidden_states"]))


def run_rows(tracker: PositionTracker, values: Tensor, name: str = "") -> Tensor:
    """The row of each token of ``values`` while a toolkit quantizes, (tokens,).

    Raises:
        BiasCompensationError: they are other tokens than its block was given.
    """
    tokens = values.shape[:-1].numel()
    rows = tracker.rows
    if rows is not None and rows.numel() == tokens:
        return rows.to(values.device).flatten()
    if rows is None:
        return torch.full((tokens,), tracker.positions, device=values.device)
    if values.dim() == 3:  # one sequence, its padding taken out
        index = torch.arange(values.shape[1], device=values.device).expand(values.shape[:2])
        return vector_rows(index, tracker.positions).flatten()
    raise BiasCompensationError(
        f"{name} sees {tokens} of {rows.numel()} tokens, so their positions are unknown; quantize "
        "with bias_compensation={'positions': 0} or {'joint': False}."
    )
