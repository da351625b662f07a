"""Vectors trained on the float model's next-token distributions, through the whole model."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from torch import Tensor, nn
from tqdm.auto import tqdm

from ..models.blocks import find_blocks
from ..models.calls import twin_of
from ..models.modules import device_of, dtype_of
from ..models.predictions import predicting_rows
from ..models.tracker import PositionTracker, Tracking
from ..ranks import given_by_first
from ..vectors.compensation import Compensation
from .config import RefinementConfig
from .data import RefinementData
from .float_logits import FloatLogits
from .gradients import differentiable
from .parameters import Trained, frozen, merged_blocks, trained
from .progress import FLOAT_MODEL, Progress
from .train import Outcome, Training
from .weights import trained_weights


def train_by_model(
    model: nn.Module,
    compensation: Compensation,
    float_model: nn.Module | FloatLogits,
    data: RefinementData,
    config: RefinementConfig,
    progress: Progress,
    copy_to_run: Callable[[nn.Module], nn.Module],
) -> Outcome:
    """Minimise the KL divergence from the float model's next-token distributions."""
    blocks = find_blocks(model, compensation.blocks)
    with ExitStack() as stack:
        logits = _float_logits(float_model, data, config, progress, stack)
        twin = twin_of(model, blocks, copy_to_run)
        stack.enter_context(frozen(twin))
        modules = blocks.modules(twin)
        tracker = PositionTracker(compensation.positions)
        stack.callback(Tracking(twin.get_submodule(blocks.owner), modules, tracker).undo)
        checkpointing = config.gradient_checkpointing
        stack.enter_context(differentiable(modules, dtype_of(twin), checkpointing))
        pairs = zip(modules, blocks.modules(model), strict=True)
        weights = trained_weights(
            config.train,
            dict(zip(blocks.names, pairs, strict=True)),
            {"": twin},
            dtype_of(twin),
            copy_to_run,
        )
        sites: dict[str, Trained] = stack.enter_context(weights)
        fixed = merged_blocks(twin, compensation)
        vectors = trained(
            {name: twin.get_submodule(name) for name in compensation.vectors},
            compensation,
            tracker,
            fixed=fixed if "vectors" in config.train else compensation.vectors,
        )
        sites |= stack.enter_context(vectors)
        device = device_of(twin)
        tokens = {number: len(predicting_rows(data.part(number))) for number in data.parts}

        def loss(number: int) -> Tensor:
            batch = {key: value.to(device) for key, value in data.part(number).items()}
            found, before = twin(**batch).logits, len(predicting_rows(data.before(number)))
            return logits.divergence(number, found, predicting_rows(batch), before)

        training = Training(sites, loss, tokens, data, config, progress, "model")
        with tqdm(total=config.steps, desc="Refining") as bar:
            return training.run(bar)


def _float_logits(
    float_model: nn.Module | FloatLogits,
    data: RefinementData,
    config: RefinementConfig,
    progress: Progress,
    stack: ExitStack,
) -> FloatLogits:
    if isinstance(float_model, FloatLogits):
        return float_model
    if progress.folder is None:
        own = stack.enter_context(tempfile.TemporaryDirectory())
        folder = Path(given_by_first(own))  # which is there until all have trained
    else:
        folder = progress.float_logits
    source = progress.inputs.get(FLOAT_MODEL)
    return FloatLogits.record(float_model, data.batches, folder, config.top_k, source)
