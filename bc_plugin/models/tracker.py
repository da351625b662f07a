"""Which row of its table each token of a running model uses.

The rows belong to the call that a thread is in: many threads may run one model. Gradient
checkpointing runs blocks again, after the call and perhaps in a thread of autograd's own. Where the
block itself does so (transformers), its rows go along; where somebody else does, they are found
again by the hidden states, which are the same.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ..errors import BiasCompensationError
from .call_tokens import ALONE, CallTokens, Surroundings
from .forwards import ReplacedForward
from .positions import first_input, parameter_names, plain_index, running_index, vector_rows

OUTSIDE = "outside of a call"
CHECKPOINT = "_gradient_checkpointing_func"  # what transformers checkpoints blocks with
WAITING = "for the first block, since no argument of the model has tokens"
LOST = (
    "a part of a compensated model was run outside of the model's own forward, so the positions of "
    "its tokens are unknown ({why}). Run the whole model, let gradient checkpointing take whole "
    "blocks, or compensate with positions=0."
)
State = CallTokens | str  # or why there are no tokens


class _Call(threading.local):
    """What a thread is at."""

    state: State = OUTSIDE


class PositionTracker:
    """Knows which row of a ``(positions + 1, features)`` table each token of a call uses.

    One tracker serves all sites of a model.
    """

    def __init__(self, positions: int) -> None:
        self.positions = positions
        self.call = _Call()
        self._seen: dict[StorageWeakRef, CallTokens] = {}
        self._limit = 64

    def __reduce__(self) -> tuple:
        return PositionTracker, (self.positions,)  # a copy has calls of its own

    # A call of the model, in this thread

    def enter(self, index: Tensor | None, around: Surroundings = ALONE) -> State:
        """A call begins; returns what ``leave`` is to be given.

        Args:
            index: Of each token in its sequence, (batch, length); None if the first block tells.
            around: What is known of the tokens before these.
        """
        if index is None:
            return self.enter_with(WAITING)
        tokens = CallTokens(self._rows_for(index), index.shape, self.positions, around)
        return self.enter_with(tokens)

    def leave(self, before: State) -> None:
        """The call ends."""
        self.call.state = before

    @contextmanager
    def during(self, index: Tensor) -> Iterator[None]:
        """While it lasts, blocks and linears that are run by themselves have these tokens."""
        before = self.enter(index)
        try:
            yield
        finally:
            self.leave(before)

    def _rows_for(self, index: Tensor) -> Tensor | None:
        rows = vector_rows(index, self.positions)
        # Decoding needs the shared row alone, and on a CPU looking costs nothing. Elsewhere it
        # would wait for the device; in a graph it would be a branch.
        if rows.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return rows
        return rows if bool((rows < self.positions).any()) else None

    # What sites ask

    @property
    def rows(self) -> Tensor | None:
        """The rows of the call's own tokens; None where all use the last.

        Raises:
            BiasCompensationError: this thread is in no call, so that positions are unknown.
        """
        return None if self.positions == 0 else self._tokens().rows

    def rows_of(self, hidden: Tensor) -> Tensor | None:
        """The rows of the tokens that a site gives, laid out like them.

        Args:
            hidden: (..., features).

        Raises:
            BiasCompensationError: the positions of its tokens are unknown.
        """
        return None if self.positions == 0 else self._tokens().rows_of(hidden)

    def _tokens(self) -> CallTokens:
        tokens = self.call.state
        if isinstance(tokens, str):
            raise BiasCompensationError(LOST.format(why=tokens))
        return tokens

    # A block that may be run again

    def keep(self, hidden: Tensor) -> None:
        """Remember the rows of a block's input, so long as that lives.

        Args:
            hidden: (batch, length, features).
        """
        if len(self._seen) >= self._limit:
            self._seen = {key: r for key, r in self._seen.items() if not key.expired()}
            self._limit = 64 + 2 * len(self._seen)
        self._seen[StorageWeakRef(hidden.untyped_storage())] = self._tokens()

    def kept(self, hidden: Tensor) -> State:
        """What ``keep`` remembered of this input."""
        return self._seen.get(StorageWeakRef(hidden.untyped_storage()), OUTSIDE)

    def state(self) -> State:
        """The tokens of the call that this thread is in, or why there are none."""
        return self.call.state

    def enter_with(self, state: State) -> State:
        """``enter`` with what ``state`` gave before."""
        before = self.state()
        self.call.state = state
        return before


class TrackedForward(ReplacedForward):
    """The forward of the module that holds the blocks: a call begins and ends with it."""

    def __init__(self, module: nn.Module, tracker: PositionTracker) -> None:
        super().__init__(module)
        self.tracker = tracker
        self.names = parameter_names(type(module))

    def run(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The module's own output."""
        arguments: Mapping[str, Any] = {**dict(zip(self.names, args, strict=False)), **kwargs}
        tracker = self.tracker
        index = running_index(arguments, tracker.positions)
        before = tracker.enter(index, Surroundings.of(arguments))
        try:
            return self.plain(module, *args, **kwargs)
        finally:
            tracker.leave(before)


class TrackedBlockForward(ReplacedForward):
    """The forward of a block, which gradient checkpointing may run again."""

    def __init__(self, module: nn.Module, tracker: PositionTracker) -> None:
        super().__init__(module)
        self.tracker = tracker

    def run(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The block's own output."""
        tracker, hidden = self.tracker, first_input(args, kwargs)
        state = tracker.state()
        if state is OUTSIDE:
            before = tracker.enter_with(tracker.kept(hidden))
            try:
                return self.plain(module, *args, **kwargs)
            finally:
                tracker.leave(before)
        if state is WAITING:
            tracker.enter(plain_index(hidden))
        if (module.training or torch.is_grad_enabled()) and not torch.compiler.is_compiling():
            tracker.keep(hidden)
            self._let_checkpoints_carry_rows(module)
        return self.plain(module, *args, **kwargs)

    def undo(self, module: nn.Module) -> None:
        """Give the module its own forward back."""
        super().undo(module)
        checkpoint = vars(module).get(CHECKPOINT)
        if isinstance(checkpoint, CarryingCheckpoint):
            setattr(module, CHECKPOINT, checkpoint.checkpoint)

    def _let_checkpoints_carry_rows(self, module: nn.Module) -> None:
        checkpoint = vars(module).get(CHECKPOINT)
        if checkpoint is not None and not isinstance(checkpoint, CarryingCheckpoint):
            setattr(module, CHECKPOINT, CarryingCheckpoint(checkpoint, self.tracker))


class CarryingCheckpoint:
    """The checkpoint function of a block, with the rows of the call carried into what it runs."""

    def __init__(self, checkpoint: Callable[..., Any], tracker: PositionTracker) -> None:
        self.checkpoint, self.tracker = checkpoint, tracker

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        run = partial(self._run, self.tracker.state(), function)
        return self.checkpoint(run, *args, **kwargs)

    def _run(self, state: State, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        before = self.tracker.enter_with(state)
        try:
            return function(*args, **kwargs)
        finally:
            self.tracker.leave(before)


class Tracking:
    """Follows every call of a model, until ``undo``.

    Args:
        owner: Runs through the blocks.
        blocks: Those that it runs.
    """

    def __init__(
        self, owner: nn.Module, blocks: Iterable[nn.Module], tracker: PositionTracker
    ) -> None:
        self.forwards: list[tuple[nn.Module, ReplacedForward]] = []
        if tracker.positions > 0:
            self.forwards.append((owner, TrackedForward(owner, tracker)))
            self.forwards += [(block, TrackedBlockForward(block, tracker)) for block in blocks]

    def undo(self) -> None:
        """Follow them no longer."""
        for module, forward in reversed(self.forwards):
            forward.undo(module)
