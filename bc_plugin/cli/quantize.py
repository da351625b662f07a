"""``bc-plugin quantize``: GPTQ with compensation."""

from __future__ import annotations

from typing import Annotated

import typer

from ..files import new_folder
from .inputs import calibration_data, load_model, load_tokenizer, pass_settings
from .options import (
    CalibrationData,
    DeviceMap,
    Dtype,
    Length,
    Out,
    Positions,
    Samples,
    Scales,
    Sites,
)
from .sites import print_sites


def quantize(
    float_model: Annotated[str, typer.Argument(metavar="FLOAT", help="Folder or hub name.")],
    out: Out,
    dataset: CalibrationData,
    bits: Annotated[int, typer.Option(help="2, 3, 4 or 8.")] = 4,
    group_size: Annotated[int, typer.Option(help="Weights that share a scale; -1: a row.")] = 128,
    sym: Annotated[bool, typer.Option(help="Symmetric quantization.")] = True,
    desc_act: Annotated[bool, typer.Option(help="Activation order.")] = False,
    positions: Positions = "1",
    sites: Sites = "linear block",
    scales: Scales = False,
    joint: Annotated[bool, typer.Option(help="Let GPTQ know that vectors will follow.")] = True,
    refine_steps: Annotated[int, typer.Option(help="Then train the vectors so many steps.")] = 0,
    samples: Samples = 128,
    length: Length = 512,
    dtype: Dtype = "auto",
    device_map: DeviceMap = "auto",
) -> None:
    """Quantize with GPTQ through transformers and Optimum, and compensate.

    Example: `bc-plugin quantize ./SmolLM2-135M ./out --bits 3 --group-size 64 --dataset text.txt`
    """
    from transformers import GPTQConfig

    from .. import enable

    enable("transformers")
    with new_folder(out) as part:
        tokenizer = load_tokenizer(float_model)
        calibration = calibration_data(
            dataset,
            tokenizer,
            length,
            samples,
            lambda: load_model(float_model, dtype, device_map),
        )
        config = GPTQConfig(
            bits=bits,
            group_size=group_size,
            sym=sym,
            desc_act=desc_act,
            dataset=calibration,
            tokenizer=tokenizer,
            bias_compensation={
                **pass_settings(positions, sites, scales),
                "joint": joint,
                "refine_steps": refine_steps,
            },
        )
        model = load_model(float_model, dtype, device_map, quantization_config=config)
        model.config.quantization_config.dataset = None  # tokens of the text: not to be published
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
    print_sites(out, by_group=True)
