"""What compensating a model will take, before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .calibration.batches import count_apart
from .config import BiasCompensationConfig
from .costs.passing import batch_of, pass_memory, sequences_used
from .costs.rate import product_rate
from .costs.refining import (
    progress_on_disk,
    recorded_predictions,
    recording_memory,
    refinement_memory,
    trained_values,
)
from .costs.shapes import shapes_of
from .costs.stored import VECTOR, packed_model, vector_values
from .costs.work import model_forward, pass_work, refinement_work
from .errors import BiasCompensationError
from .refinement.config import RefinementConfig


@dataclass(frozen=True)
class Stage:
    """One thing that is run.

    Attributes:
        memory: Bytes in each process at its peak, by what they are for.
        disk: Bytes that are written, by what they are for.
        passes: Forward passes, by what is run: in the pass over all tokens that it uses, in
            refinement over a batch.
        flops: Operations, of all processes together.
        seconds: At the rate of matrix products, shared by the processes.
    """

    memory: dict[str, int]
    disk: dict[str, int]
    passes: dict[str, float]
    flops: float
    seconds: float


@dataclass(frozen=True)
class Plan:
    """What ``plan`` estimates.

    Attributes:
        stages: ``"pass"``, and with a refinement ``"float predictions"`` and ``"refinement"``.
        vectors: Their size in bytes; exact, where every linear of the blocks is quantized.
        checkpoint: Bytes of the quantized model, without them.
        tokens: That the pass uses.
        devices: Processes, each with a device and a share of the sequences.
        flops_per_second: Of one device.
    """

    stages: dict[str, Stage]
    vectors: int
    checkpoint: int
    tokens: int
    devices: int
    flops_per_second: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready values."""
        return asdict(self)


def plan(
    float_model: str | Path,
    config: BiasCompensationConfig | Mapping[str, Any] | bool = True,
    refinement: RefinementConfig | None = None,
    *,
    bits: int = 4,
    group_size: int = 128,
    samples: int = 128,
    length: int = 512,
    devices: int = 1,
    dtype: str = "auto",
    flops_per_second: float | None = None,
) -> Plan:
    """Estimate memory, disk, operations and time of a pass, and of a refinement by model after it.

    Everything follows from the model's config; weights need not be there. Memory is that of the
    pass as ``bc-plugin compensate`` runs it, from folders, block by block. The formulas stand in
    ``bc_plugin.costs``.

    Args:
        float_model: A folder with a config.json, or a name on the hub.
        config: Settings of the pass.
        refinement: Those of the refinement; None for none.
        bits, group_size: Of the quantized weights, in GPTQ's format; -1 for a group a row.
        samples, length: Sequences of calibration data, and tokens of each.
        devices: Processes that share the sequences, each with a device of its own.
        dtype: The type that models are loaded in; ``"auto"`` is the checkpoint's.
        flops_per_second: Of one device; measured on this machine, in a second or so, if None.

    Raises:
        BiasCompensationError: transformers makes no causal language model of the config, or a
            refinement has fewer than two sequences.
    """
    settings = BiasCompensationConfig.parse(config) or BiasCompensationConfig()
    shapes = shapes_of(float_model)
    kind = shapes.dtype if dtype == "auto" else getattr(torch, dtype)
    rate = flops_per_second or product_rate(kind)
    used = sequences_used(samples, length, settings.token_limit)
    stored_in = VECTOR if settings.dtype == "auto" else getattr(torch, settings.dtype).itemsize
    vectors = vector_values(shapes, settings, length) * stored_in
    checkpoint = packed_model(shapes, bits, group_size, shapes.dtype.itemsize)
    written = {"checkpoint": checkpoint + vectors}
    packing = bits, group_size, kind.itemsize

    def stage(
        memory: dict[str, int], disk: dict[str, int], passes: dict[str, float], flops: float
    ) -> Stage:
        return Stage(memory, disk, passes, flops, flops / rate / devices)

    memory = pass_memory(shapes, settings, *packing, -(-used // devices), length)
    work = pass_work(shapes, settings, used * length, length)
    stages = {"pass": stage(memory, written, *work)}
    if refinement is not None:
        apart = _held_out(samples, refinement.held_out)
        batch = batch_of(-(-(samples - apart) // devices), length, refinement.batch_tokens)
        recorded = recorded_predictions(shapes, samples, length, refinement.top_k)
        stages["float predictions"] = stage(
            recording_memory(shapes, kind.itemsize, batch),
            {"predictions": recorded},
            {"batches": samples * length / batch},
            model_forward(shapes, samples * length, length),
        )
        values = trained_values(shapes, settings, refinement.kinds, group_size, length)
        stages["refinement"] = stage(
            refinement_memory(shapes, refinement, *packing, batch, values),
            {"predictions": recorded, "progress": progress_on_disk(values), **written},
            *refinement_work(shapes, refinement, apart * length, batch, length),
        )
    return Plan(stages, vectors, checkpoint, used * length, devices, rate)


def _held_out(samples: int, share: float) -> int:
    if samples < 2:
        raise BiasCompensationError(
            "refinement needs at least two calibration sequences, one to be held out."
        )
    return count_apart(samples, share)
