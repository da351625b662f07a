"""Vectors trained block by block, for models that do not fit: one block in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm

from ..models.blocks import Blocks, find_blocks
from ..models.calls import BlockCalls
from ..models.float_blocks import BlockSnapshot, LiveBlocks, float_blocks_of
from ..models.modules import device_of, dtype_of
from ..models.offloaded import lent
from ..models.predictions import next_token_log_probabilities
from ..models.record import record_calls, skipped_blocks
from ..models.tracker import PositionTracker
from ..ranks import summed
from ..vectors.compensation import Compensation
from .config import RefinementConfig
from .data import RefinementData
from .gradients import differentiable
from .parameters import Trained, frozen, merged_blocks, trained
from .progress import Progress
from .train import Outcome, Training
from .weights import trained_weights


def train_by_block(
    model: nn.Module,
    compensation: Compensation,
    float_model: nn.Module | BlockSnapshot,
    data: RefinementData,
    config: RefinementConfig,
    progress: Progress,
    copy_to_run: Callable[[nn.Module], nn.Module],
) -> Outcome:
    """Minimise the error of every block's output, from the first to the last.

    A block is fed what the compensated blocks before it give, and compared with what the float
    block gives for the float model's input: it also learns to undo the error that reaches it.
    Blocks with smaller errors may predict worse all the same, so the new vectors are kept only if
    the KL divergence of next-token distributions falls, on held-out sequences.
    """
    blocks = find_blocks(model, compensation.blocks)
    source = float_blocks_of(float_model)
    start = float_model if isinstance(float_model, nn.Module) else model
    with torch.no_grad():
        recorded = record_calls(start, blocks, map(data.part, data.parts), device_of(start))
        stream = dict(zip(data.parts, recorded, strict=True))  # of this rank's parts
    tokens = {number: int((calls.index >= 0).sum()) for number, calls in stream.items()}
    given = {number: calls.hidden for number, calls in stream.items()}  # to the quantized blocks
    unrefined = {n: given[n] for n in data.apart if n in given}  # with the old vectors
    fixed = merged_blocks(model, compensation)
    if "vectors" not in config.train:
        fixed = set(compensation.vectors)
    vectors: dict[str, Tensor] = {}
    weights: dict[str, Tensor] = {}
    steps = 0
    with tqdm(total=config.steps * len(blocks.names), desc="Refining blocks") as bar:
        for number, name in enumerate(blocks.names):
            with ExitStack() as stack:
                stack.enter_context(lent(model, name))
                block = copy_to_run(model.get_submodule(name)).eval()
                targets = _targets(source, name, number, stream, device_of(block))
                own = _sites_within(block, name, compensation)
                tracker = PositionTracker(compensation.positions)
                trainer = _Block(block, number, stream, given, targets, dtype_of(model), tracker)
                stack.enter_context(frozen(block))
                stack.enter_context(differentiable([block], trainer.dtype, False))
                pair = {name: (block, model.get_submodule(name))}
                place = pair, {name: block}, trainer.dtype, copy_to_run
                sites: dict[str, Trained] = stack.enter_context(
                    trained_weights(config.train, *place)
                )
                sites |= stack.enter_context(trained(own, compensation, tracker, fixed))
                with torch.no_grad():
                    unrefined = {n: trainer.run(n, hidden) for n, hidden in unrefined.items()}
                if sites:
                    training = Training(sites, trainer.loss, tokens, data, config, progress, name)
                    outcome = training.run(bar)
                    steps = max(steps, outcome.steps)
                    vectors |= outcome.vectors
                    weights |= outcome.weights
                with torch.no_grad():
                    given = {n: trainer.run(n, hidden) for n, hidden in given.items()}
            for number, target in targets.items():
                stream[number].hidden = target
    found = {number: given[number] for number in unrefined}
    before, after = (
        _divergence(start, blocks, data, stream, outputs) for outputs in (unrefined, found)
    )
    if after < before:
        return Outcome(vectors, before, after, steps, weights)
    return Outcome(dict(compensation.vectors), before, before, steps)


@torch.no_grad()
def _targets(
    source: LiveBlocks | BlockSnapshot,
    name: str,
    number: int,
    stream: Mapping[int, BlockCalls],
    device: torch.device,
) -> dict[int, Tensor]:
    """What the float block gives, by batch."""
    with source.load(name, device) as reference:
        dtype = dtype_of(reference)
        return {
            batch: calls.run(reference, number, device, dtype, lasting=True)
            for batch, calls in stream.items()
        }


class _Block:
    """One block, what it is given, and what it should give."""

    def __init__(
        self,
        block: nn.Module,
        number: int,
        stream: Mapping[int, BlockCalls],
        given: Mapping[int, Tensor],
        targets: Mapping[int, Tensor],
        dtype: torch.dtype,
        tracker: PositionTracker,
    ) -> None:
        self.block, self.number, self.stream = block, number, stream
        self.given, self.targets, self.dtype = given, targets, dtype
        self.tracker = tracker

    def run(self, number: int, hidden: Tensor) -> Tensor:
        """The block's output for a batch's hidden states."""
        calls = self.stream[number]
        given = BlockCalls(hidden, calls.index, calls.calls)
        with self.tracker.during(calls.index):
            return given.run(self.block, self.number, device_of(self.block), self.dtype)

    def loss(self, number: int) -> Tensor:
        """Its relative error, summed over tokens."""
        index = self.stream[number].index
        return relative_error(self.run(number, self.given[number]), self.targets[number], index)


def relative_error(output: Tensor, target: Tensor, index: Tensor) -> Tensor:
    """Sum over real tokens of the squared error, relative to the squared norm of the target.

    Relative, since the norm in front of the next layer takes each token's own magnitude out; the
    attention sink would drown all others otherwise.
    """
    features = target.shape[-1]
    error = (output.float() - target.float()).reshape(-1, features).square().sum(-1)
    size = target.float().reshape(-1, features).square().sum(-1)
    real = index.flatten().to(error.device) >= 0
    return (error[real] / size[real]).sum()


@torch.no_grad()
def _divergence(
    model: nn.Module,
    blocks: Blocks,
    data: RefinementData,
    stream: Mapping[int, BlockCalls],
    found: Mapping[int, Tensor],
) -> float:
    """Mean KL divergence of next-token distributions, in nats, by what the last block gives.

    Args:
        model: What follows its blocks turns hidden states into predictions.
        stream: What the float blocks gave, by batch.
        found: What the quantized blocks gave, by batch that counts.
    """
    total, tokens = 0.0, 0
    for number, hidden in found.items():
        part = data.part(number)
        with skipped_blocks(model, blocks, stream[number].hidden):
            log_p = next_token_log_probabilities(model, part)
        with skipped_blocks(model, blocks, hidden):
            log_q = next_token_log_probabilities(model, part)
        total += functional.kl_div(log_q, log_p, reduction="sum", log_target=True).item()
        tokens += len(log_p)
    total, tokens = summed([torch.tensor([total, tokens], dtype=torch.float64)])[0].tolist()
    return total / tokens


def _sites_within(block: nn.Module, name: str, compensation: Compensation) -> dict[str, nn.Module]:
    """The block itself and its linears, those that have vectors, by site."""
    return {
        site: block.get_submodule(site[len(name) + 1 :])
        for site in compensation.vectors
        if site == name or site.startswith(f"{name}.")
    }
