"""Vectors, scales and norms trained against the float model, from the closed form on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .calibration.items import checked_items, vocabulary_of
from .errors import BiasCompensationError
from .models.blocks import find_block_lists, find_blocks
from .models.float_blocks import BlockSnapshot
from .models.modules import copy_of, device_of, dtype_of
from .ranks import are_several, require_same
from .refinement.by_block import train_by_block
from .refinement.by_model import train_by_model
from .refinement.checksums import checksum, surroundings_checksum
from .refinement.config import RefinementConfig
from .refinement.data import RefinementData
from .refinement.float_logits import FloatLogits
from .refinement.progress import FLOAT_MODEL, Progress
from .refinement.source import Source, check_source, require_float, source_checksum
from .refinement.train import Outcome
from .refinement.weights import trainable, write_weights
from .shift.same_model import require_same_model
from .vectors.compensation import Compensation
from .vectors.weights import forget_floats, weights_of

OTHER_RANKS = (
    "the ranks are to refine different models or vectors, or with different settings; give all of "
    "them the same, and each its share of the calibration data."
)


def refine(
    model: nn.Module,
    float_model: nn.Module | FloatLogits | BlockSnapshot,
    calibration: Iterable[Any],
    config: RefinementConfig | None = None,
    *,
    folder: str | Path | None = None,
) -> Compensation:
    """Train a compensated model; new vectors, scales and norms take the old ones' place.

    Args:
        model: Compensated, with its vectors attached.
        float_model: The model it came from. With ``by="model"`` what ``record_float_logits`` wrote
            will do, so that both models need not be in memory together.
        calibration: Model inputs, ``{"input_ids", "attention_mask"}``, as for ``compensate``.
        folder: Where to keep what a stopped run has reached: called again with the same arguments
            it goes on from there, and comes to the same vectors. It is there at the end as well,
            since what is returned is in memory only: delete it once that is saved. None keeps
            nothing.

    Returns:
        The new compensation, of the same shapes and types. Where scales or norms were trained, it
        belongs to the model as it is now: ``Compensation.save`` alone does not hold them. On
        held-out sequences it is at least as good as the old one.

    Raises:
        BiasCompensationError: the model is not compensated, the float model is not the one that it
            came from, there are fewer than two sequences, ``folder`` is another run's, damaged or
            cannot be written, or the loss is not finite.
    """
    compensation = Compensation.attached_to(model)
    if compensation is None:
        raise BiasCompensationError(
            "the model is not compensated; refinement starts from a compensation, see "
            "bc_plugin.compensate."
        )
    if isinstance(float_model, nn.Module):
        require_float(float_model)
        require_same_model(model, float_model, find_block_lists(model, compensation.blocks))
    compensation.detach(model)
    result = compensation
    try:
        result = train_vectors(model, compensation, float_model, calibration, config, folder=folder)
    finally:
        result.attach_unchecked(model)
    return result


def record_float_logits(
    float_model: nn.Module,
    calibration: Iterable[Any],
    config: RefinementConfig | None = None,
    *,
    folder: str | Path,
) -> FloatLogits:
    """Write what the float model predicts for the calibration data, for ``refine``.

    Args:
        folder: A safetensors file per batch goes there; those already written from the same model
            for the same batch are kept.

    Raises:
        BiasCompensationError: the model is compensated, or a file there is damaged or cannot be
            written.
    """
    require_float(float_model)
    config = config or RefinementConfig()
    data = RefinementData(checked_items(calibration, vocabulary_of(float_model)), config)
    return FloatLogits.record(float_model, data.batches, folder, config.top_k)


def train_vectors(
    model: nn.Module,
    compensation: Compensation,
    float_model: nn.Module | FloatLogits | BlockSnapshot,
    calibration: Iterable[Any],
    config: RefinementConfig | None = None,
    *,
    folder: str | Path | None = None,
    copy_to_run: Callable[[nn.Module], nn.Module] = copy_of,
) -> Compensation:
    """``refine`` for a model whose compensation is not attached, and stays so.

    Args:
        copy_to_run: Makes of a quantized block the copy that is run.
    """
    config = config or RefinementConfig()
    if not compensation.vectors:
        raise BiasCompensationError("the compensation has no vectors that could be trained.")
    if "convolution" in compensation.kinds.values():
        raise BiasCompensationError(
            "refinement is for language models; this compensation has vectors of convolutions."
        )
    on_cpu = device_of(model).type == "cpu"
    if config.mixed_precision == "bf16" and dtype_of(model) == torch.float16 and on_cpu:
        raise BiasCompensationError(
            "mixed_precision='bf16' needs a model in float32 or bfloat16 on a CPU, where PyTorch's "
            "autocast takes no float16; load the model with dtype=torch.float32."
        )
    data = RefinementData(checked_items(calibration, vocabulary_of(model)), config)
    check_source(float_model, model, data, config)
    config = replace(config, train=_kinds(model, compensation, config, copy_to_run))
    # Saving rounds the errors, which decide how far steps go: from here on it makes no difference.
    start = Compensation.from_entry(compensation.entry(), compensation.vectors)
    progress = Progress(None)
    if folder is not None or are_several():
        settings = {**asdict(config), "dtype": str(dtype_of(model))}
        inputs = _inputs(model, start, float_model, data)
        require_same([settings, inputs], OTHER_RANKS)
        progress = Progress(None if folder is None else Path(folder), settings, inputs)
    by = {"model": train_by_model, "block": train_by_block}[config.by]
    with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
        outcome = by(model, start, float_model, data, config, progress, copy_to_run)
    refined = _with_vectors(compensation, outcome, config)
    if not write_weights(model, outcome.weights):
        return refined
    # They were trained together, so scales and norms rely on the vectors from here on.
    forget_floats(model)
    found = weights_of(model, refined.blocks, refined.vectors)
    return refined.replaced(
        digest=found.digest, float_weights=found.float_weights, joint=True, scales=True
    )


def _kinds(
    model: nn.Module,
    compensation: Compensation,
    config: RefinementConfig,
    copy_to_run: Callable[[nn.Module], nn.Module],
) -> tuple[str, ...]:
    """What is trained."""
    if config.train != "auto" or config.kinds == ("vectors",):
        return config.kinds
    name = find_blocks(model, compensation.blocks).names[0]
    return trainable(config.kinds, model, name, copy_to_run)


def _inputs(
    model: nn.Module, start: Compensation, source: Source, data: RefinementData
) -> dict[str, str]:
    """Fingerprints of whatever decides what training comes to, beside its settings."""
    after = {name: errors.after for name, errors in start.errors.items()}
    return {
        "quantized weights": start.digest,
        "weights around the quantized blocks": surroundings_checksum(model, start.blocks),
        "vectors": checksum([start.vectors, start.kinds, after, start.positions, start.blocks]),
        "calibration data": checksum(data.batches),
        FLOAT_MODEL: source_checksum(source),
    }


def _with_vectors(
    compensation: Compensation, outcome: Outcome, config: RefinementConfig
) -> Compensation:
    """The same compensation with what training came to, in the types it had."""
    vectors = {}
    for name, vector in outcome.vectors.items():
        stored = vector.to(compensation.vectors[name].dtype)
        vectors[name] = (stored if bool(torch.isfinite(stored).all()) else vector).cpu()
    refined_with = {
        "by": config.by,
        "train": list(config.train),
        "steps": outcome.steps,
        "before": outcome.before,
        "after": outcome.after,
    }
    return compensation.replaced(vectors=vectors, refined=refined_with)
