"""What every block of a model is called with, recorded without running the blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BiasCompensationError
from .arguments import hidden_output, hidden_states, moved, with_hidden
from .blocks import Blocks
from .calls import (
    Batch,
    BlockCalls,
    BlocksDone,
    Call,
    replaced_blocks,
    run_until_done,
    without_cache,
)
from .modules import copy_of, device_of
from .positions import (
    call_arguments,
    context_index,
    parameter_names,
    plain_index,
    token_index,
)


@contextmanager
def skipped_blocks(model: nn.Module, blocks: Blocks, hidden: Tensor) -> Iterator[None]:
    """While it lasts, what the last block gives is ``hidden``, whatever the model is called with.

    Only the first block is run, for the form of what blocks return.
    """
    first = _FirstBlock(model, blocks)

    def forward(number: int, *args: Any, **kwargs: Any) -> Any:
        if number == 0:
            first.run(*args, **kwargs)
        given = hidden_states(blocks.names[number], args, kwargs)
        if number == len(blocks.names) - 1:
            given = hidden.to(given)
        return first.like(given)

    with without_cache(model), replaced_blocks(model, blocks, forward):
        yield


class _FirstBlock:
    """A copy of the first block, run for what blocks return beside the hidden states."""

    def __init__(self, model: nn.Module, blocks: Blocks) -> None:
        self.block = copy_of(model.get_submodule(blocks.names[0]))
        self.forward = self.block.forward  # before anything takes its place
        self.output: Any = None

    def run(self, *args: Any, **kwargs: Any) -> None:
        """Find out, anew for every call where it is something, such as T5's position bias."""
        if isinstance(self.output, Tensor) or (self.output is not None and len(self.output) == 1):
            return
        device = device_of(self.block)
        args, kwargs = moved((args, kwargs), device, None)  # what it writes there is forgotten
        self.output = self.forward(*args, **kwargs)
        hidden_output(self.block, self.output)  # there are some

    def like(self, hidden: Tensor) -> Any:
        """What a block returns whose hidden states are ``hidden``."""
        return hidden if isinstance(self.output, Tensor) else with_hidden(self.output, hidden)


def record_calls(
    model: nn.Module, blocks: Blocks, batches: Iterable[Batch], device: torch.device
) -> Iterable[BlockCalls]:
    """What every block is called with, for each batch, without running the blocks.

    The float model's stream starts here; each block's output is the next one's input. Blocks may
    be called differently (masks and rotary embeddings by kind of layer), so every call is kept.
    Blocks return zeros meanwhile, so whatever else the next one is given was added in between.
    Blocks of other lists are run as they are.

    Raises:
        BiasCompensationError: the model does not come to its blocks, or does not run them once each
            in their order, or reshapes hidden states in between.
    """
    first = _FirstBlock(model, blocks)
    for batch in batches:
        yield _record(model, blocks, batch, device, first)


def _record(
    model: nn.Module, blocks: Blocks, batch: Batch, device: torch.device, first: _FirstBlock
) -> BlockCalls:
    record: BlockCalls | None = None
    index: Tensor | None = None

    def observe(module: nn.Module, args: tuple, kwargs: dict) -> None:
        nonlocal index
        index = token_index(call_arguments(module, args, kwargs))

    def forward(number: int, *args: Any, **kwargs: Any) -> Any:
        nonlocal record
        given = hidden_states(blocks.names[number], args, kwargs)
        added = None
        if record is None:
            block = model.get_submodule(blocks.names[number])
            _require_one_stream(blocks.names[number], block, kwargs)
            first.run(*args, **kwargs)
            record = BlockCalls(
                given,
                plain_index(given) if index is None else index,
                context=context_index(call_arguments(block, args, kwargs)),
            )
        elif bool(given.any()):
            added = given
        _require_next(blocks, number, len(record.calls), given.shape == record.hidden.shape)
        args, kwargs = args[1:], {k: v for k, v in kwargs.items() if k != "hidden_states"}
        record.calls.append(Call(args, kwargs, added))
        if number == len(blocks.names) - 1:
            raise BlocksDone
        return first.like(torch.zeros_like(given))

    owner = model.get_submodule(blocks.owner)
    handle = owner.register_forward_pre_hook(observe, with_kwargs=True)
    try:
        with replaced_blocks(model, blocks, forward):
            run_until_done(model, batch, device)
    finally:
        handle.remove()
    reached = 0 if record is None else len(record.calls)
    if reached < len(blocks.names):
        raise BiasCompensationError(
            f"the model ran without calling its block {blocks.names[reached]!r}. Blocks have to be "
            "run once each; name others with blocks=..., or use data that reaches them all, such "
            "as images where they attend to images."
        )
    return record


def _require_one_stream(name: str, block: nn.Module, kwargs: Mapping[str, Any]) -> None:
    first = parameter_names(type(block))[0]
    if first in kwargs and first != "hidden_states":  # Reformer's reversible layers
        raise BiasCompensationError(
            f"{name} takes {first!r} before its hidden states, so it carries more than one stream; "
            "such blocks cannot be compensated. Name others with blocks=..."
        )


def _require_next(blocks: Blocks, number: int, expected: int, same_shape: bool) -> None:
    if number != expected:
        raise BiasCompensationError(
            f"the model calls its block {blocks.names[number]!r} where {blocks.names[expected]!r} "
            "is next. Blocks have to be run once each, in their order; name others with "
            "blocks=..., or use data that reaches them all, such as images where they attend to "
            "images."
        )
    if not same_shape:
        raise BiasCompensationError(
            f"the model reshapes hidden states on their way to its block {blocks.names[number]!r}, "
            "so what that is given cannot be told; name other blocks with blocks=..."
        )
