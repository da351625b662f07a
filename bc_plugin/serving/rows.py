"""Which row of its table each token of a batch uses, known from vLLM's own positions.

A batch has tokens of many sequences one behind the other: parts of prompts, whatever was cached or
computed before them, and single tokens. vLLM gives the model the absolute position of each. They
become rows in a buffer that all tables are gathered by, outside of what is compiled, and inside of
what is captured as a CUDA graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper

from ..errors import BiasCompensationError
from ..models.positions import call_arguments

OUTSIDE = (
    "{model} is compiled by vLLM as a whole, so the positions of its tokens cannot be followed; "
    "use vLLM's own class for it (--model-impl vllm), or --enforce-eager, or compensate with "
    "positions=0."
)
TWICE = (
    "vLLM runs two halves of a batch at once here (--enable-dbo), whose rows would be mixed up; "
    "leave it out, or compensate with positions=0."
)


def rows_for(vllm_config: Any, positions: int, device: torch.device) -> Tensor:
    """A buffer for the rows of any batch; int64, and every token uses the last row so far."""
    captured = vllm_config.compilation_config.max_cudagraph_capture_size or 0
    size = max(vllm_config.scheduler_config.max_num_batched_tokens, captured)
    # Batches are filled up to a multiple of the processes where these share the tokens.
    size += vllm_config.parallel_config.tensor_parallel_size
    return torch.full((size,), positions, dtype=torch.int64, device=device)


def follow_positions(model: nn.Module, rows: Tensor, positions: int, vllm_config: Any) -> None:
    """Write the rows of a batch whenever the model is called with it.

    Args:
        model: What vLLM calls.
        rows: As ``rows_for`` made it.
        positions: Number of leading positions with a vector of their own.

    Raises:
        BiasCompensationError: the model will be called in another way.
    """
    compiled = isinstance(model, TorchCompileWithNoGuardsWrapper)
    if compiled and not getattr(model, "do_not_compile", False):
        raise BiasCompensationError(OUTSIDE.format(model=type(model).__name__))
    if vllm_config.parallel_config.use_ubatching:
        raise BiasCompensationError(TWICE)
    model.register_forward_pre_hook(RowsWriter(rows, positions), with_kwargs=True)


class RowsWriter:
    """A hook before a model's forward."""

    def __init__(self, rows: Tensor, positions: int) -> None:
        self.rows = rows
        self.positions = positions

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        index = call_arguments(model, args, kwargs).get("positions")
        if index is None:
            raise BiasCompensationError(
                f"vLLM calls {type(model).__name__} without positions, on which its "
                "bias_compensation vectors depend; compensate with positions=0."
            )
        if index.dim() == 2:  # of several axes, as transformers' models have them, too
            index = index[0]
        if len(index) > len(self.rows):
            raise BiasCompensationError(
                f"a batch has {len(index)} tokens where at most {len(self.rows)} were announced; "
                "please report this."
            )
        torch.clamp(index, max=self.positions, out=self.rows[: len(index)])
