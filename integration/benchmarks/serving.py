"""A 3-bit SmolLM2-135M, exported and served by vLLM, next to transformers with the plugin.

    make benchmark-serving

Both read the same held-out tokens; vLLM also generates, to see what biases cost it. The same
weights without compensation tell how much the two engines differ anyway.
"""

from __future__ import annotations

import json
import math
import os
import shutil

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import torch
from rich.console import Console
from rich.table import Table
from rig.engines.with_vllm import log_probabilities
from rig.folders import CACHE
from rig.quantizers.pipelines import PIPELINES
from rig.subjects import real, tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

import bc_plugin
from bc_plugin import Compensation
from bc_plugin.engines.plain import read_tensors, write_checkpoint
from bc_plugin.engines.widen import widen

FOLDER = CACHE / "serving"
BITS, GROUP_SIZE, SAMPLES, LENGTH, EVALUATED, GENERATED = 3, 64, 32, 512, 12, 64


def prepare(calibration: list) -> None:
    """A compensated checkpoint, its export, and the same weights without compensation."""
    pipeline = PIPELINES["gptqmodel"]
    settings = {"bits": BITS, "group_size": GROUP_SIZE, **pipeline.settings}
    bc_plugin.enable()
    # Not jointly, so that the weights without vectors are worth comparing.
    flag = {"positions": 0, "joint": False}
    result = pipeline.quantize(str(real.smollm2()), calibration, flag, settings)
    pipeline.save(result, FOLDER / "compensated")
    bc_plugin.disable()
    bc_plugin.export(FOLDER / "compensated", FOLDER / "with", engine="vllm")
    config = json.loads((FOLDER / "compensated" / "config.json").read_text())
    config["quantization_config"].pop("bias_compensation")
    tensors = read_tensors(FOLDER / "compensated")
    widen(tensors, config["quantization_config"])
    (FOLDER / "without").mkdir()
    write_checkpoint(FOLDER / "without", FOLDER / "compensated", tensors, config)


def by_transformers(ids: list[list[int]]) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(FOLDER / "compensated").eval()
    compensation = Compensation.load(FOLDER / "compensated")
    compensation.attach(model)
    found = {"with": _scores(model, ids)}
    compensation.detach(model)
    return {"without": _scores(model, ids), **found}


def _scores(model, ids: list[list[int]]) -> torch.Tensor:
    # One prompt at a time, since its logits alone are a hundred megabytes.
    return torch.cat([tiny.log_probabilities(model, row[None]) for row in torch.tensor(ids)])


def main() -> None:
    torch.manual_seed(0)
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    tokenizer = AutoTokenizer.from_pretrained(real.smollm2())
    prepare(real.calibration_windows(tokenizer, LENGTH, SAMPLES))
    windows = real.held_out_windows(tokenizer, LENGTH, EVALUATED)
    ids = [window["input_ids"][0].tolist() for window in windows]
    ours = by_transformers(ids)
    table = Table(
        "vectors",
        "perplexity, transformers",
        "perplexity, vLLM",
        "apart",
        "mean |log p apart|",
        "tokens/s, vLLM",
    )
    table.title = f"SmolLM2-135M, {BITS} bits, group {GROUP_SIZE}, widened to 4; {len(ids)} prompts"
    for name in ("without", "with", "without", "with"):
        found = log_probabilities(FOLDER / name, ids, FOLDER, generate=GENERATED)
        theirs = torch.tensor(found["log_probabilities"])
        first, second = (math.exp(-scores.mean().item()) for scores in (ours[name], theirs))
        speeds = [found["tokens"] / seconds for seconds in found["seconds"]]
        table.add_row(
            name,
            f"{first:.2f}",
            f"{second:.2f}",
            f"{second / first - 1:+.1%}",
            f"{(ours[name] - theirs).abs().mean():.3f}",
            " ".join(f"{speed:.1f}" for speed in speeds),
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
