"""``bc-plugin refine``: train the vectors, and scales and norms."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import BiasCompensationError
from ..files import new_folder
from .inputs import calibration_data, load_model, load_tokenizer
from .options import (
    CalibrationData,
    DeviceMap,
    Dtype,
    FloatModel,
    Length,
    Out,
    Samples,
)
from .sites import print_sites


def refine(
    compensated: Annotated[Path, typer.Argument(metavar="COMPENSATED", help="A checkpoint.")],
    float_model: FloatModel,
    out: Out,
    dataset: CalibrationData,
    steps: Annotated[int, typer.Option(help="Steps of training; by block, in each.")] = 64,
    train: Annotated[
        str, typer.Option(help="Any of `vectors`, `scales` (of groups) and `norms`.")
    ] = "vectors",
    by: Annotated[str, typer.Option(help="Compare the `model`, or each `block`.")] = "model",
    learning_rate: Annotated[float, typer.Option(help="Change per step, as a share.")] = 0.1,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, a third more time.")
    ] = False,
    mixed_precision: Annotated[str, typer.Option(help="`no` or `bf16`.")] = "no",
    samples: Samples = 128,
    length: Length = 512,
    dtype: Dtype = "auto",
    device_map: DeviceMap = "auto",
) -> None:
    """Train the vectors of a compensated checkpoint against the float model.

    A run that is stopped leaves OUT.refining; the same command goes on from there.

    Example: `bc-plugin refine ./compensated ./SmolLM2-135M ./refined --dataset text.txt`
    """
    from .. import Compensation, RefinementConfig, enable, record_float_logits
    from .. import refine as run
    from ..refinement.progress import delete_progress

    enable("transformers")
    config = RefinementConfig(
        steps=steps,
        train=tuple(train.replace(",", " ").split()),
        by=by,
        learning_rate=learning_rate,
        gradient_checkpointing=gradient_checkpointing,
        mixed_precision=mixed_precision,
    )
    started = out.with_name(f"{out.name}.refining")
    with new_folder(out) as part:
        tokenizer = load_tokenizer(float_model)
        reference = load_model(float_model, dtype, device_map)
        calibration = calibration_data(dataset, tokenizer, length, samples, lambda: reference)
        if by == "model":  # what it predicts is all that is needed of it
            logits = started / "float_logits"
            reference = record_float_logits(reference, calibration, config, folder=logits)
        model = load_model(str(compensated), dtype, device_map)
        if Compensation.attached_to(model) is None:
            raise BiasCompensationError(
                f"{compensated} is not compensated; start with `bc-plugin compensate`."
            )
        run(model, reference, calibration, config, folder=started)
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
    delete_progress(started)  # not before: OUT is all that is left of the training
    print_sites(out, by_group=True)
