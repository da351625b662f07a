"""Calibration batches as calls of a model's blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..config import BiasCompensationConfig
from ..errors import BiasCompensationError
from ..models.blocks import Blocks
from ..models.calls import Batch, BlockCalls
from ..models.modules import device_of
from ..models.record import record_calls
from ..models.stream_check import check_stream
from ..ranks import gathered
from .batches import calibration_batches


@contextmanager
def _told() -> Iterator[None]:
    """What a model says of inputs that it does not take, which is anything, as an error of ours."""
    try:
        yield
    except BiasCompensationError:
        raise
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise BiasCompensationError(
            f"the float model does not take the calibration data ({type(error).__name__}: "
            f"{error}); expected items that it can be called with, tensors of the shapes that it "
            "takes."
        ) from error


def _first_sequence(batch: Batch) -> Batch:
    """One sequence of a batch, which tells as much as all; the batch, if it cannot be divided."""
    if isinstance(batch, torch.Tensor):
        return batch[:1]
    sizes = {len(v) if isinstance(v, torch.Tensor) and v.dim() else 0 for v in batch.values()}
    return {key: value[:1] for key, value in batch.items()} if len(sizes) == 1 else batch


def prepare_stream(
    model: nn.Module,
    blocks: Blocks,
    calibration: Iterable[Any],
    config: BiasCompensationConfig,
    checked: bool = True,
) -> tuple[list[BlockCalls], int]:
    """The calibration data as calls of the model's first block, some of it held out.

    Args:
        model: The float model, or what is left of it around its blocks.
        checked: Whether its blocks are still there to be checked on one batch.

    Returns:
        The calls, and the number of leading positions with a vector of their own.

    Raises:
        BiasCompensationError: the data is empty, all padding, or too short for the positions, or
            there is too little of it to hold some out where that is needed; the model's blocks
            cannot be run one after another.
    """
    fitted, apart = calibration_batches(calibration, config)
    device = device_of(model)

    def kept(calls: BlockCalls) -> BlockCalls:
        calls.on_disk = config.offload_activations
        calls.hidden = calls.kept(calls.hidden)
        return calls

    with _told():
        if checked and fitted:  # of several ranks some may have nothing
            check_stream(model, blocks, _first_sequence(fitted[0]))
        stream = [kept(calls) for calls in record_calls(model, blocks, fitted, device)]
    longest = max(gathered(max((int(calls.index.max()) + 1 for calls in stream), default=0)))
    if config.positions != "all" and longest <= config.positions:
        raise BiasCompensationError(
            f"the longest calibration sequence has {longest} tokens; positions={config.positions} "
            f"needs more than {config.positions}, so that later tokens have a mean too."
        )
    if config.keep_only_if_better and not any(gathered(bool(apart))):
        raise BiasCompensationError(
            "keep_only_if_better needs at least two calibration sequences, one to be held out."
        )
    if apart:
        with _told():
            held_out = [kept(calls) for calls in record_calls(model, blocks, apart, device)]
        for calls in held_out:
            calls.apart = True
        stream += held_out
    widths = sorted({calls.hidden.shape[-1] for calls in stream})
    if len(widths) > 1:
        raise BiasCompensationError(
            f"the calibration data comes to hidden states of {widths[0]} and of {widths[-1]} "
            "features; expected one width, that of the model (are there inputs_embeds of another?)."
        )
    return stream, longest if config.positions == "all" else config.positions
