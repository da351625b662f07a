"""Whether blocks that run one after another give what the model gives that has them."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BiasCompensationError
from .arguments import hidden_output
from .blocks import Blocks
from .calls import Batch, BlocksDone, run_until_done
from .modules import device_of
from .record import record_calls


def check_stream(model: nn.Module, blocks: Blocks, batch: Batch) -> None:
    """Run the blocks of a float model as compensation does, and compare with the model itself.

    It takes two forward passes over the batch.

    Raises:
        BiasCompensationError: the last block gives something else, or a block runs more than once.
    """
    device = device_of(model)
    expected = _last_output(model, blocks, batch, device)
    calls = next(iter(record_calls(model, blocks, [batch], device)))
    for number, name in enumerate(blocks.names):
        block = model.get_submodule(name)
        calls.hidden = calls.run(block, number, device_of(block), None, lasting=True)
    if not bool(torch.isfinite(expected).all()):
        return  # nothing to compare with; the pass itself says where that starts
    apart = _apart(calls.hidden, expected, calls.index)
    # Nothing but the order of sums differs, if that; half of the digits are far more than enough.
    if apart > torch.finfo(expected.dtype).eps ** 0.5:
        raise BiasCompensationError(
            f"the blocks of {type(model).__name__}, {blocks.path!r}, run one after another, do not "
            f"give what they give within the model: they are off by {apart:.2g} of its size. The "
            "model does something between its blocks that is not known here, or is not the same "
            "each time. It cannot be compensated; name other blocks with blocks=... if it has some."
        )


def _last_output(model: nn.Module, blocks: Blocks, batch: Batch, device: torch.device) -> Tensor:
    """What the last block gives in a run of the model itself."""
    runs = dict.fromkeys(blocks.names, 0)
    outputs: list[Tensor] = []

    def count(name: str) -> None:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            runs[name] += 1
            if name == blocks.names[-1]:
                outputs[:] = [hidden_output(module, output)]

        hooks.callback(model.get_submodule(name).register_forward_hook(hook).remove)

    def stop(module: nn.Module, args: tuple) -> None:
        raise BlocksDone  # logits are large

    with ExitStack() as hooks:
        for name in blocks.names:
            count(name)
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        if head is not None:
            hooks.callback(head.register_forward_pre_hook(stop).remove)
        run_until_done(model, batch, device)
    for name, times in runs.items():
        if times == 0:
            raise BiasCompensationError(
                f"the calibration data never reaches the block {name!r} of {type(model).__name__}. "
                "Use data that does: blocks that attend to images (Mllama) need some with images."
            )
        if times > 1:
            raise BiasCompensationError(
                f"{type(model).__name__} runs its block {name!r} {times} times in one forward "
                "pass. Layers that share their weights, as in ALBERT, cannot be compensated; name "
                "other blocks with blocks=... if it has some."
            )
    return outputs[0]


def _apart(found: Tensor, expected: Tensor, index: Tensor) -> float:
    """Relative distance of all but one in a hundred tokens at most; padding does not count."""
    wide = torch.promote_types(expected.dtype, torch.float32)
    distance = (found.to(expected.device, wide) - expected.to(wide)).norm(dim=-1)
    relative = distance / expected.to(wide).norm(dim=-1).clamp(min=torch.finfo(wide).tiny)
    if relative.shape == index.shape:
        relative = relative[index.to(relative.device) >= 0]
    return relative.flatten().quantile(0.99).item()
