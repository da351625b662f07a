"""What others do to repair a GPTQ model, or to round better in the first place."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from comparison_part import GROUP_SIZE, LENGTH, REFINED_SAMPLES, STEPS, Part

RANK = 32


def gptaq(part: Part, variant: str) -> None:
    """gptqmodel's GPTAQ, which knows what the layers before have lost."""
    from gptqmodel.quantization.config import GPTAQConfig

    seconds = part.quantized(variant, gptaq=GPTAQConfig(device="cpu"))
    part.measure(variant, part.load(variant), seconds - part.quantized("gptq"))


def eora(part: Part, variant: str) -> None:
    """gptqmodel's low-rank adapter on GPTQ's weights."""
    from gptqmodel import GPTQModel
    from gptqmodel.adapter.adapter import Lora

    folder = part.folder / variant
    start = time.perf_counter()
    GPTQModel.adapter.generate(
        adapter=Lora(rank=RANK, path=str(folder)),
        model_id_or_path=str(part.source),
        quantized_model_id_or_path=str(part.folder / "gptq"),
        calibration_dataset=part.calibration,
        device="cpu",
    )
    seconds = time.perf_counter() - start
    adapter = Lora(rank=RANK, path=str(folder))
    model = GPTQModel.load(str(part.folder / "gptq"), adapter=adapter, device="cpu").model
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    added = sum(RANK * (m.in_features + m.out_features) for m in part.linears())
    part.measure(variant, model, seconds, size, added)


def norm(part: Part, variant: str) -> None:
    """gptqmodel's norm tuning, with the refinement's budget; in gptqmodel 7.7's environment."""
    from gptqmodel import BACKEND, GPTQModel, NormConfig

    start = time.perf_counter()
    qmodel = GPTQModel.load(str(part.folder / "gptq"), backend=BACKEND.TORCH, device="cpu")
    tuning = NormConfig(teacher=part.reference, steps=STEPS)
    qmodel.requantize(calibration=part.more, norm=tuning, batch_size=4)
    part.measure(variant, qmodel.model, time.perf_counter() - start)


def auto_round(part: Part, variant: str) -> None:
    """AutoRound with its defaults, but for the data: as much of it, of the refinement's text."""
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM

    def quantize(folder: Path) -> None:
        torch.manual_seed(0)
        scheme = {"bits": part.bits, "group_size": GROUP_SIZE, "sym": False, "data_type": "int"}
        rounding = AutoRound(
            AutoModelForCausalLM.from_pretrained(part.source),
            part.tokenizer,
            scheme=scheme,
            dataset=[window["input_ids"] for window in part.more],
            seqlen=LENGTH,
            nsamples=REFINED_SAMPLES,
            device_map="cpu",
        )
        rounding.quantize_and_save(str(folder), format="auto_gptq")

    seconds = part.made(variant, quantize)
    part.measure(variant, part.load(variant), seconds - part.quantized("gptq"))
