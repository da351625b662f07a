"""What compensation costs, as ratios measured in one run:

    python -m integration.benchmarks.speed

- generation: time per token of the compensated model over that of the uncompensated one, the two
  run in turns, median of many turns;
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

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

import bc_plugin
from bc_plugin import Compensation
from integration import real

TURNS, NEW_TOKENS = 30, 8


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
    bc_plugin.enable()
    demo = real.CACHE / "demo"
    ids = torch.randint(3, 40_000, (1, 64))
    names = ("GPTQ", "positions=0", "positions=1")
    models = {name: AutoModelForCausalLM.from_pretrained(demo / name) for name in names}
    models["GPTQ again"] = AutoModelForCausalLM.from_pretrained(demo / "GPTQ")  # shows the noise
    times: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():
        _seconds_per_token(model, ids)  # warm up
    for turn in range(TURNS):
        for name in random.Random(turn).sample(sorted(models), len(models)):
            times[name].append(_seconds_per_token(models[name], ids))
    table = Table("", "ms per token", "over GPTQ", "vectors", "of the checkpoint")
    for name, model in models.items():
        compensation = Compensation.attached_to(model)
        size = compensation.nbytes if compensation else 0
        total = sum(f.stat().st_size for f in (demo / "GPTQ").glob("*.safetensors"))
        ratio = statistics.median(a / b for a, b in zip(times[name], times["GPTQ"], strict=True))
        table.add_row(
            name,
            f"{1000 * statistics.median(times[name]):.1f}",
            f"{ratio:.3f}",
            f"{size:,} B",
            f"{size / total:.2%}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
