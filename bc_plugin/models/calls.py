"""How a model calls its blocks, one batch at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .activations import on_disk
from .arguments import hidden_output, moved
from .blocks import Blocks
from .forwards import ReplacedForward
from .modules import copy_of, decompress

Batch = Mapping[str, Any] | Tensor


class BlocksDone(Exception):
    """Ends a run that is only made to see what the blocks are called with, or what they give."""


@dataclass
class Call:
    """How a model calls one of its blocks.

    Attributes:
        args, kwargs: The arguments beside the hidden states.
        added: What the model adds to the hidden states on their way to the block, as Qwen3-VL does
            with images, of their shape; None where they come as the block before gave them.
    """

    args: tuple
    kwargs: dict[str, Any]
    added: Tensor | None = None


@dataclass
class BlockCalls:
    """One batch's way through the blocks.

    Attributes:
        hidden: What the block before the one about to run gave, (batch, length, features).
        index: int64 (batch, length), each token's index in its sequence, -1 for padding.
        calls: How each block is called.
        apart: Whether the batch is kept apart for measuring.
        context: The index of the tokens that the blocks attend to beside their own, if any.
        on_disk: Whether hidden states are kept in files.
    """

    hidden: Tensor
    index: Tensor
    calls: list[Call] = field(default_factory=list)
    apart: bool = False
    context: Tensor | None = None
    on_disk: bool = False

    def kept(self, hidden: Tensor) -> Tensor:
        """Hidden states as they are kept from one block to the next."""
        return on_disk(hidden) if self.on_disk else hidden

    def run(
        self,
        block: nn.Module,
        number: int,
        device: torch.device,
        dtype: torch.dtype | None,
        *,
        lasting: bool = False,
    ) -> Tensor:
        """Output of ``block``, the one at ``number``, for the current hidden states.

        Args:
            dtype: The type of all arguments that are floats; None for the types they have.
            lasting: Whether the blocks behind see what this one writes into its arguments, as they
                do of the float model's own blocks; any other block is given copies.
        """
        call, hidden = self.calls[number], self.hidden
        if call.added is not None:
            hidden = hidden + call.added.to(hidden)
        args = moved(call.args, device, dtype, lasting)
        kwargs = {key: moved(value, device, dtype, lasting) for key, value in call.kwargs.items()}
        return hidden_output(block, block(moved(hidden, device, dtype), *args, **kwargs))


def call_model(model: nn.Module, batch: Batch, device: torch.device) -> Any:
    """Run ``model`` on one calibration batch, moved to ``device``."""
    if isinstance(batch, Tensor):
        return model(batch.to(device))
    inputs = {key: moved(value, device, None) for key, value in batch.items()}
    return model(**inputs)


def twin_of(
    model: nn.Module, blocks: Blocks, copy_to_run: Callable[[nn.Module], nn.Module] = copy_of
) -> nn.Module:
    """A copy of a whole model to run, with each block as ``copy_to_run`` gives it."""
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        return model
    modules = [model.get_submodule(name) for name in blocks.names]
    twin = copy.deepcopy(model, {id(module): copy_to_run(module) for module in modules})
    decompress(twin)
    return twin


class _StandIn(ReplacedForward):
    """A function in place of a block's forward, which is not run."""

    def __init__(self, module: nn.Module, number: int, forward: Callable[..., Any]) -> None:
        super().__init__(module)
        self.number, self.forward = number, forward

    def run(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """What the function gives for the block's number and arguments."""
        return self.forward(self.number, *args, **kwargs)


@contextmanager
def replaced_blocks(model: nn.Module, blocks: Blocks, forward) -> Iterator[None]:
    """While it lasts, ``forward``, with the block's number in front, in place of all blocks."""
    with ExitStack() as stack:
        for number, module in enumerate(blocks.modules(model)):
            stack.callback(_StandIn(module, number, forward).undo, module)
        yield


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
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


def run_until_done(model: nn.Module, batch: Batch, device: torch.device) -> None:
    """Run ``model`` without a cache until something in it raises ``BlocksDone``."""
    with without_cache(model), suppress(BlocksDone):
        call_model(model, batch, device)
