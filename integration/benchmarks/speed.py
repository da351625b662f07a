"""What compensation costs, as ratios measured in one run: ``make benchmark``.

- generation: time per token of the compensated model over that of the same model without its
  vectors, in turns, median of many turns; "none again" shows the noise;
- size: bytes of the vectors over bytes of the checkpoint.

Reads what ``integration/demo.py`` saved: run ``make demo`` first. The time of the pass beside that
of quantizing is in the demo's own table.
"""

from __future__ import annotations

import os
import random
import statistics
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# gptqmodel's CPU kernel dequantizes for every token. Kept weights make tokens several times faster,
# so that whatever the vectors cost shows more; and nothing is compiled anew as they come and go.
os.environ.setdefault("GPTQ_TORCH_CACHE_WEIGHTS", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import torch
from rich.console import Console
from rich.table import Table
from rig.folders import CACHE
from transformers import AutoModelForCausalLM

from bc_plugin import Compensation

TURNS, NEW_TOKENS = 60, 16


def _seconds_per_token(model, ids: torch.Tensor) -> float:
    start = time.perf_counter()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
    )
    return (time.perf_counter() - start) / NEW_TOKENS


def main() -> None:
    torch.manual_seed(0)
    demo = CACHE / "demo"
    ids = torch.randint(3, 40_000, (1, 64))
    model = AutoModelForCausalLM.from_pretrained(demo / "GPTQ")
    variants = {
        "none": None,
        "positions=0": Compensation.load(demo / "positions=0"),
        "positions=1": Compensation.load(demo / "positions=1"),
        "none again": None,
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(-1, TURNS):
        for name in random.Random(turn).sample(sorted(variants), len(variants)):
            compensation = variants[name]
            if compensation:
                compensation.attach(model)
            seconds = _seconds_per_token(model, ids)
            if turn >= 0:  # the turn before is to warm up
                times[name].append(seconds)
            if compensation:
                compensation.detach(model)
    table = Table("vectors", "ms per token", "over none", "bytes", "of the checkpoint")
    total = sum(file.stat().st_size for file in (demo / "GPTQ").glob("*.safetensors"))
    for name, compensation in variants.items():
        size = compensation.nbytes if compensation else 0
        turns = zip(times[name], times["none"], strict=True)
        table.add_row(
            name,
            f"{1000 * statistics.median(times[name]):.1f}",
            f"{statistics.median(a / b for a, b in turns):.3f}",
            f"{size:,}",
            f"{size / total:.2%}",
        )
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
