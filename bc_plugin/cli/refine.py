"""``bc-plugin refine``: train the vectors, and scales and norms."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from ..errors import BiasCompensationError
from ..files import check_out, new_folder
from ..gguf.file import is_gguf
from ..names import KEY
from ..refinement.config import RefinementConfig
from .arguments import check_loading, float_config, model_config, text_of
from .gguf import refine_file
from .inputs import float_inputs, folder_of, load_as_stored, load_model, stream_or
from .options import (
    BatchTokens,
    CalibrationData,
    DeviceMap,
    Dtype,
    FloatModel,
    Length,
    Out,
    Samples,
)
from .outputs import write
from .ranks import by_first, is_first
from .sites import load_compensation, print_sites
from .stopped import making

LearningRate = Annotated[float, typer.Option(help="Largest change per step, as a share.")]


def refine(
    compensated: Annotated[
        str, typer.Argument(metavar="COMPENSATED", help="Checkpoint, or GGUF file.")
    ],
    float_model: FloatModel,
    out: Out,
    dataset: CalibrationData,
    steps: Annotated[
        int, typer.Option(help="Steps of training; by block, in each.")
    ] = RefinementConfig.steps,
    train: Annotated[
        str, typer.Option(help="Any of `vectors`, `scales` (of groups) and `norms`; `auto`: all.")
    ] = "auto",
    by: Annotated[str, typer.Option(help="Compare the `model`, or each `block`.")] = "model",
    learning_rate: LearningRate = RefinementConfig.learning_rate,
    scales_learning_rate: LearningRate = RefinementConfig.scales_learning_rate,
    norms_learning_rate: LearningRate = RefinementConfig.norms_learning_rate,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, a third more time.")
    ] = False,
    mixed_precision: Annotated[str, typer.Option(help="`no` or `bf16`.")] = "no",
    batch_tokens: BatchTokens = RefinementConfig.batch_tokens,
    samples: Samples = 128,
    length: Length = 512,
    dtype: Dtype = "auto",
    device_map: DeviceMap = "auto",
) -> None:
    """Train the vectors, scales and norms of a compensated checkpoint against the float model.

    A run that is stopped leaves OUT.refining; the same command goes on from there. Started by
    torchrun, each process takes its share of the sequences.

    Example: `bc-plugin refine ./compensated ./SmolLM2-135M ./refined --dataset text.txt`
    """
    config = RefinementConfig(
        steps=steps,
        train=tuple(train.replace(",", " ").split()),
        by=by,
        learning_rate=learning_rate,
        scales_learning_rate=scales_learning_rate,
        norms_learning_rate=norms_learning_rate,
        gradient_checkpointing=gradient_checkpointing,
        mixed_precision=mixed_precision,
        batch_tokens=batch_tokens,
    )
    if is_first():
        _tidy(out)
    check_out(out)
    started = _progress_of(out)
    if started.exists() and not started.is_dir():
        raise BiasCompensationError(f"{started} is for progress, and is a file; name another OUT.")
    if is_gguf(compensated):
        data = dataset, config, samples, length, dtype, device_map
        refine_file(compensated, float_model, out, *data, started)
        return
    float_config(float_model)
    _require_compensated(compensated)
    check_loading(dtype, device_map)
    text = text_of(dataset)
    again = f"the same command goes on from {started}"
    with making(out, again), by_first(new_folder(out)) as part:
        from .. import Compensation, enable, record_float_logits
        from .. import refine as run
        from ..refinement.disk import writing
        from ..refinement.progress import about_to_place, delete_progress

        enable("transformers")
        opened = stream_or if by == "block" else lambda load: load
        tokenizer, calibration, reference = float_inputs(
            float_model, text, length, samples, dtype, device_map, opened(load_model)
        )
        if by == "model":  # what it predicts is all that is needed of it
            logits = started / "float_logits"
            reference = record_float_logits(reference, calibration, config, folder=logits)
        model = opened(load_as_stored)("COMPENSATED", compensated, dtype, device_map)
        if Compensation.attached_to(model) is None:  # left in its files, as the weights are
            Compensation.load(folder_of(compensated)).attach(model)
        refined = run(model, reference, calibration, config, folder=started)
        if part is not None:
            with writing(out, f"The training is kept in {started}"):
                write(compensated, part, refined, model, tokenizer)
            about_to_place(started, refined.vectors)
    if part is not None:
        delete_progress(started)  # not before: OUT is all that is left of the training
        print_sites(out, by_group=True)


def _progress_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.refining")


def _tidy(out: Path) -> None:
    """Delete the progress of a run that was killed once its result was in place."""
    if not (out.name and out.exists() and _progress_of(out).exists()):
        return
    started = _progress_of(out)
    from ..refinement.progress import delete_progress, is_in_place

    with suppress(BiasCompensationError):  # what is there is not that result
        if is_in_place(started, load_compensation(out).vectors):
            delete_progress(started)


def _require_compensated(name: str) -> None:
    """An error before the float model has run, which takes long."""
    config = model_config("COMPENSATED", name)
    if KEY not in (config.get("quantization_config") or config):
        raise BiasCompensationError(
            f"{name} is not compensated: the quantization_config in its config.json has no entry "
            "bias_compensation. Name the compensated checkpoint first, then the float model; "
            "`bc-plugin compensate` makes one of a quantized checkpoint."
        )
