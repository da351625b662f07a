"""``bc-plugin compensate``: a checkpoint that is quantized already."""

from __future__ import annotations

from typing import Annotated

import typer

from ..config import BiasCompensationConfig
from ..files import check_out, new_folder
from ..gguf.file import is_gguf
from .arguments import check_loading, float_config, model_config, text_of
from .gguf import compensate_file, settings_for_file
from .inputs import float_inputs, load_as_stored, load_model, pass_settings, stream_or
from .options import (
    BatchTokens,
    CalibrationData,
    DeviceMap,
    Dtype,
    FloatModel,
    Integers,
    Length,
    OffloadActivations,
    Out,
    Samples,
    Scales,
    Sites,
)
from .outputs import write
from .ranks import by_first
from .sites import print_sites
from .stopped import making


def compensate(
    quantized: Annotated[
        str, typer.Argument(metavar="QUANTIZED", help="Quantized checkpoint, or GGUF file.")
    ],
    float_model: FloatModel,
    out: Out,
    dataset: CalibrationData,
    positions: Annotated[
        str | None,
        typer.Option(
            help="Leading tokens with a vector of their own: 0, 1, ... or `all`. Unless given, 1; "
            "a GGUF file has room for 0.",
        ),
    ] = None,
    sites: Sites = "linear block",
    scales: Scales = False,
    integers: Integers = False,
    samples: Samples = 128,
    length: Length = 512,
    dtype: Dtype = "auto",
    device_map: DeviceMap = "auto",
    offload_activations: OffloadActivations = False,
    batch_tokens: BatchTokens = BiasCompensationConfig.batch_tokens,
) -> None:
    """Compensate a checkpoint that is quantized already, or a GGUF file of llama.cpp's.

    Vectors that it has are computed anew. Of a GGUF file, OUT is one, too. Both models are read
    block by block where their formats are known, and loaded whole otherwise. Started by torchrun,
    each process takes its share of the sequences.

    Example: `bc-plugin compensate ./gptq ./SmolLM2-135M ./out --dataset text.txt --positions 0`
    """
    if is_gguf(quantized):
        one = settings_for_file(positions, sites, scales, integers, batch_tokens)
        data = dataset, one, samples, length, dtype, device_map
        compensate_file(quantized, float_model, out, *data)
        return
    settings = pass_settings(
        positions or "1",
        sites,
        scales=scales,
        integers=integers,
        offload_activations=offload_activations,
        batch_tokens=batch_tokens,
    )
    check_out(out)
    model_config("QUANTIZED", quantized)
    float_config(float_model)
    check_loading(dtype, device_map)
    text = text_of(dataset)
    with making(out), by_first(new_folder(out)) as part:
        from .. import Compensation, enable
        from .. import compensate as run

        enable("transformers")
        tokenizer, calibration, reference = float_inputs(
            float_model, text, length, samples, dtype, device_map, stream_or(load_model)
        )
        model = stream_or(load_as_stored)("QUANTIZED", quantized, dtype, device_map)
        before = Compensation.attached_to(model)
        if before is not None:
            before.detach(model)
        compensation = run(model, reference, calibration, settings)
        if part is not None:
            write(quantized, part, compensation, model, tokenizer)
    if part is not None:
        print_sites(out, by_group=True)
