"""``bc-plugin quantize``: GPTQ with compensation."""

from __future__ import annotations

from functools import partial
from inspect import signature
from typing import Annotated

import typer

from ..errors import BiasCompensationError
from ..files import check_out, new_folder
from .arguments import BITS, check_gptq, check_loading, float_config, text_of
from .inputs import calibration_data, load_model, load_tokenizer, pass_settings
from .options import (
    CalibrationData,
    DeviceMap,
    Dtype,
    Integers,
    Length,
    Out,
    Positions,
    Samples,
    Scales,
    Sites,
)
from .sites import print_sites
from .stopped import making


def quantize(
    float_model: Annotated[str, typer.Argument(metavar="FLOAT", help="Folder or hub name.")],
    out: Out,
    dataset: CalibrationData,
    bits: Annotated[int, typer.Option(help=", ".join(map(str, BITS)))] = 4,
    group_size: Annotated[int, typer.Option(help="Weights that share a scale; -1: a row.")] = 128,
    sym: Annotated[bool, typer.Option(help="Symmetric quantization.")] = True,
    desc_act: Annotated[bool, typer.Option(help="Activation order.")] = False,
    act_group_aware: Annotated[
        bool | None, typer.Option(help="Activation order of groups, GPTQModel's default.")
    ] = None,
    damp: Annotated[float, typer.Option(help="Damping, as a share of the Hessian.")] = 0.1,
    positions: Positions = "1",
    sites: Sites = "linear block",
    scales: Scales = False,
    integers: Integers = False,
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
    settings = pass_settings(
        positions, sites, scales=scales, integers=integers, joint=joint, refine_steps=refine_steps
    )
    check_out(out)
    check_gptq(bits, group_size, damp, desc_act, act_group_aware)
    float_config(float_model)
    check_loading(dtype, device_map)
    text = text_of(dataset)
    with making(out), new_folder(out) as part:
        from transformers import GPTQConfig

        from .. import enable

        enable("transformers")
        tokenizer = load_tokenizer("FLOAT", float_model)
        load = partial(load_model, "FLOAT", float_model, dtype, device_map)
        config = GPTQConfig(
            bits=bits,
            group_size=group_size,
            damp_percent=damp,
            sym=sym,
            desc_act=desc_act,
            dataset=calibration_data(text, tokenizer, length, samples, load),
            tokenizer=tokenizer,
            bias_compensation=settings,
            **_order(GPTQConfig, act_group_aware),
        )
        model = load(quantization_config=config)
        model.config.quantization_config.dataset = None  # tokens of the text: not to be published
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
    print_sites(out, by_group=True)


def _order(config: type, act_group_aware: bool | None) -> dict[str, bool]:
    """The toolkit's own default where nothing is said; AutoGPTQ knows no such order."""
    if act_group_aware and "act_group_aware" not in signature(config).parameters:
        raise BiasCompensationError(
            "--act-group-aware: this version of transformers quantizes with AutoGPTQ, which has no "
            "such order; leave it out."
        )
    return {} if act_group_aware is None else {"act_group_aware": act_group_aware}
