"""``bc-plugin compensate``: a checkpoint that is quantized already."""

from __future__ import annotations

from typing import Annotated

import typer

from ..files import new_folder
from .inputs import calibration_data, load_model, load_tokenizer, pass_settings
from .options import (
    CalibrationData,
    DeviceMap,
    Dtype,
    FloatModel,
    Length,
    Out,
    Positions,
    Samples,
    Scales,
    Sites,
)
from .sites import print_sites


def compensate(
    quantized: Annotated[str, typer.Argument(metavar="QUANTIZED", help="Quantized checkpoint.")],
    float_model: FloatModel,
    out: Out,
    dataset: CalibrationData,
    positions: Positions = "1",
    sites: Sites = "linear block",
    scales: Scales = False,
    samples: Samples = 128,
    length: Length = 512,
    dtype: Dtype = "auto",
    device_map: DeviceMap = "auto",
) -> None:
    """Compensate a checkpoint that is quantized already.

    Vectors that it has are computed anew.

    Example: `bc-plugin compensate ./gptq ./SmolLM2-135M ./out --dataset text.txt --positions 0`
    """
    from .. import Compensation, enable
    from .. import compensate as run

    enable("transformers")
    settings = pass_settings(positions, sites, scales)
    with new_folder(out) as part:
        tokenizer = load_tokenizer(float_model)
        reference = load_model(float_model, dtype, device_map)
        calibration = calibration_data(dataset, tokenizer, length, samples, lambda: reference)
        model = load_model(quantized, dtype, device_map)
        before = Compensation.attached_to(model)
        if before is not None:
            before.detach(model)
        compensation = run(model, reference, calibration, settings)
        compensation.attach(model)
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
    print_sites(out, by_group=True)
