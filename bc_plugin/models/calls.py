"""What the blocks of a model are called with, block by block, for a set of calibration batches."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BiasCompensationError
from .blocks import Blocks
from .forwards import ReplacedForward
from .modules import copy_of
from .positions import call_arguments, context_index, plain_index, token_index

Batch = Mapping[str, Any] | Tensor


class _LastBlockReached(Exception):
    """Ends a run that is only made to see what the blocks are called with."""


@dataclass
class BlockCalls:
    """One batch's way through the blocks.

    Attributes:
        hidden: Input of the block about to run, (batch, length, features).
        index: int64 (batch, length), each token's index in its sequence, -1 for padding.
        calls: For every block, the other arguments it is called with.
        apart: Whether the batch is kept apart for measuring.
        context: The index of the tokens that the blocks attend to beside their own, if any.
    """

    hidden: Tensor
    index: Tensor
    calls: list[tuple[tuple, dict[str, Any]]] = field(default_factory=list)
    apart: bool = False
    context: Tensor | None = None

    def run(self, block: nn.Module, number: int, device: torch.device, dtype: torch.dtype | None):
        """Output of ``block``, the one at ``number``, for the current hidden states."""
        args, kwargs = _move(self.calls[number], device, dtype)
        output = block(_move(self.hidden, device, dtype), *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output


def _move(value: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    if isinstance(value, Tensor):
        if dtype is None or dtype == value.dtype or not value.is_floating_point():
            return value.to(device)
        # In masks the smallest number of a type stands for minus infinity, yet must not become it:
        # padding attends to nothing else, and a softmax over nothing is not a number.
        smallest = value == torch.finfo(value.dtype).min
        return value.to(device, dtype).masked_fill_(smallest.to(device), torch.finfo(dtype).min)
    if isinstance(value, (tuple, list)):
        return type(value)(_move(item, device, dtype) for item in value)
    if isinstance(value, dict):
        return {key: _move(item, device, dtype) for key, item in value.items()}
    return value


def call_model(model: nn.Module, batch: Batch, device: torch.device) -> Any:
    """Run ``model`` on one calibration batch, moved to ``device``."""
    if isinstance(batch, Tensor):
        return model(batch.to(device))
    inputs = {key: _move(value, device, None) for key, value in batch.items()}
    return model(**inputs)


def twin_of(
    model: nn.Module, blocks: Blocks, copy_to_run: Callable[[nn.Module], nn.Module] = copy_of
) -> nn.Module:
    """A copy of a whole model to run, with each block as ``copy_to_run`` gives it."""
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        return model
    modules = [model.get_submodule(name) for name in blocks.names]
    return copy.deepcopy(model, {id(module): copy_to_run(module) for module in modules})


class _StandIn(ReplacedForward):
    """A function in place of a block's forward, which is not run."""

    def __init__(self, module: nn.Module, number: int, forward: Callable[..., Any]) -> None:
        super().__init__(module)
        self.number, self.forward = number, forward

    def run(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """What the function gives for the block's number and arguments."""
        return self.forward(self.number, *args, **kwargs)


@contextmanager
def _replaced_blocks(model: nn.Module, blocks: Blocks, forward) -> Iterator[None]:
    with ExitStack() as stack:
        for number, module in enumerate(blocks.modules(model)):
            stack.callback(_StandIn(module, number, forward).undo, module)
        yield


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    # A cache would grow with every run of a block. Parts of a model may have a config of their own.
    found = (getattr(module, "config", None) for module in model.modules())
    configs = [config for config in found if getattr(config, "use_cache", False) is True]
    try:
        for config in configs:
            config.use_cache = False
        yield
    finally:
        for config in configs:
            config.use_cache = True


def _run_up_to_blocks(model: nn.Module, batch: Batch, device: torch.device) -> None:
    with _without_cache(model), suppress(_LastBlockReached):
        call_model(model, batch, device)


@contextmanager
def skipped_blocks(model: nn.Module, blocks: Blocks, hidden: Tensor) -> Iterator[None]:
    """While it lasts, what the last block gives is ``hidden``, whatever the model is called with.

    Only the first block is run, for the form of what blocks return.
    """
    first = copy_of(model.get_submodule(blocks.names[0])).forward
    rest: tuple | None = None

    def forward(number: int, *args: Any, **kwargs: Any) -> Any:
        nonlocal rest
        if number == 0:
            output = first(*args, **kwargs)
            rest = output[1:] if isinstance(output, tuple) else None
        given = args[0] if args else kwargs["hidden_states"]
        if number == len(blocks.names) - 1:
            given = hidden.to(given)
        return given if rest is None else (given, *rest)

    with _without_cache(model), _replaced_blocks(model, blocks, forward):
        yield


class _FirstBlock:
    """A copy of the first block, run for the form of what blocks return."""

    def __init__(self, model: nn.Module, blocks: Blocks) -> None:
        self.forward = copy_of(model.get_submodule(blocks.names[0])).forward
        self.width = 0

    def run(self, *args: Any, **kwargs: Any) -> None:
        """Find out how many values blocks return as a tuple; 0 for the bare hidden states."""
        output = self.forward(*args, **kwargs)
        self.width = len(output) if isinstance(output, tuple) else 0

    def rest(self, *args: Any, **kwargs: Any) -> tuple:
        """What it returns beside the hidden states, such as T5's position bias."""
        return self.forward(*args, **kwargs)[1:] if self.width > 1 else ()


def record_calls(
    model: nn.Module, blocks: Blocks, batches: Sequence[Batch], device: torch.device
) -> Iterable[BlockCalls]:
    """What every block is called with, for each batch, without running the blocks.

    The float model's stream starts here; each block's output is the next one's input. Blocks may
    be called differently (masks and rotary embeddings by kind of layer), so every call is kept.
    Blocks of other lists are run as they are.

    Raises:
        BiasCompensationError: the model does not come to its blocks.
    """
    first = _FirstBlock(model, blocks)

    def run_first(number: int, *args: Any, **kwargs: Any) -> None:
        first.run(*args, **kwargs)
        raise _LastBlockReached

    with _replaced_blocks(model, blocks, run_first):
        _run_up_to_blocks(model, batches[0], device)
    for batch in batches:
        yield _record(model, blocks, batch, device, first)


def _record(
    model: nn.Module, blocks: Blocks, batch: Batch, device: torch.device, first: _FirstBlock
) -> BlockCalls:
    record: BlockCalls | None = None
    index: Tensor | None = None
    rest: tuple = ()

    def observe(module: nn.Module, args: tuple, kwargs: dict) -> None:
        nonlocal index
        index = token_index(call_arguments(module, args, kwargs))

    def forward(number: int, *args: Any, **kwargs: Any) -> Any:
        nonlocal record, rest
        hidden = args[0] if args else kwargs["hidden_states"]
        if record is None:
            rest = first.rest(*args, **kwargs)
            block = model.get_submodule(blocks.names[number])
            record = BlockCalls(
                hidden,
                plain_index(hidden) if index is None else index,
                context=context_index(call_arguments(block, args, kwargs)),
            )
        args, kwargs = args[1:], {k: v for k, v in kwargs.items() if k != "hidden_states"}
        record.calls.append((args, kwargs))
        if number == len(blocks.names) - 1:
            raise _LastBlockReached
        return (hidden, *rest) if first.width else hidden

    owner = model.get_submodule(blocks.owner)
    handle = owner.register_forward_pre_hook(observe, with_kwargs=True)
    try:
        with _replaced_blocks(model, blocks, forward):
            _run_up_to_blocks(model, batch, device)
    finally:
        handle.remove()
    if record is None:
        raise BiasCompensationError(f"the model ran without calling its block {blocks.names[0]!r}.")
    return record
