"""A 3-bit SmolLM2-135M served by vLLM, with its vectors and exported, next to transformers.

    make benchmark-serving

The checkpoints are those of `make benchmark-comparison`, made first unless they are there. Both
engines read the same held-out tokens; the same weights without compensation tell how much the two
differ anyway. Then prompts of 1 to 600 tokens in one batch, read in parts and continued twice, so
that what was read is found cached the second time; then vLLM's speed with vectors and without, in
turns. (Two workers cannot share this model, which has 9 heads: tests have tiny models for them.)
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from comparison_part import EVALUATED, GROUP_SIZE, LENGTH, Part
from comparison_part import FOLDER as COMPARED
from comparison_variants import EVERYTHING
from rich.console import Console
from rich.table import Table
from rig.engines.with_vllm import log_probabilities, run_vllm, speeds
from rig.folders import CACHE
from rig.subjects import real
from rig.subjects.served import scores_of
from transformers import AutoTokenizer

import bc_plugin
from bc_plugin import Compensation
from bc_plugin.engines.keep import write_kept
from bc_plugin.engines.plain import read_tensors, write_checkpoint
from bc_plugin.engines.widen import widen

FOLDER = CACHE / "serving"
BITS, SEED, GENERATED, TURNS, TOGETHER = 3, 0, 64, 3, 4
REFINED, STEPS, SEQUENCES = "refined-to-be-served", 8, 64
# What is served, and what transformers reads to compare.
SERVED = {
    "without": "without",
    "biases": "positions=0",
    "positions=0": "positions=0",
    "positions=1, joint": "positions=1, joint",
    "the same, refined": "the same, refined",
}
CONTINUED_ONES = ("without", "positions=1, joint", "the same, refined")
TIMED = ("without", "positions=0", "positions=1, joint")
UNEVEN, PART, CONTINUED = (1, 2, 9, 40, 200, 600), 128, 32


def prepare() -> None:
    """Write what is served, widened to 4 bits: without vectors, as biases, and with vectors."""
    script = Path(__file__).with_name("comparison.py")
    made = ["bc-0", "joint-1"]
    settings = [f"--bits={BITS}", f"--seed={SEED}", "--only", *made]
    subprocess.run([sys.executable, str(script), *settings], check=True)
    source = COMPARED / f"{BITS}-{SEED}"
    # A few steps: how well they are served is asked here, not how good they are.
    few = {"steps": STEPS, "evaluate_every": STEPS, "held_out": 1 / 8, "train": EVERYTHING}
    if not (source / REFINED).exists():
        bc_plugin.enable()
        part = Part(BITS, SEED)
        part.refined(REFINED, "joint-1", few, part.more[:SEQUENCES])
        bc_plugin.disable()
        found = part.found[REFINED]["refined"]
        if not found["after"] < found["before"]:
            raise SystemExit(f"{STEPS} steps made nothing better, so there is nothing to serve.")
    # Not jointly, so that the weights without vectors are worth comparing.
    bc_plugin.export(source / "bc-0", FOLDER / "biases", engine="vllm")
    _widen(source / "bc-0")
    for variant, name in (("joint-1", "positions=1, joint"), (REFINED, "the same, refined")):
        bc_plugin.export(source / variant, FOLDER / name, engine="vllm")


def _widen(source: Path) -> None:
    """The same weights with 4 bits, with the vectors as they are, and without."""
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"].pop("bias_compensation")
    tensors, compensation = read_tensors(source), Compensation.load(source)
    widen(tensors, config["quantization_config"])
    for name in ("without", "positions=0"):
        (FOLDER / name).mkdir()
    write_checkpoint(FOLDER / "without", source, tensors, config)
    write_kept(FOLDER / "positions=0", source, tensors, config, compensation)


def agreement(ids: list[list[int]]) -> Table:
    """vLLM's log-probabilities beside those of transformers with the plugin."""
    table = Table("served", "perplexity, transformers", "vLLM", "apart", "mean |log p apart|")
    table.title = f"SmolLM2-135M, {BITS} bits, group {GROUP_SIZE}, widened to 4; {len(ids)} prompts"
    for name, compared in SERVED.items():
        ours = torch.cat(scores_of(FOLDER / compared, ids))
        found = log_probabilities(FOLDER / name, ids, FOLDER)
        theirs = torch.cat([torch.tensor(row) for row in found])
        first, second = (math.exp(-scores.mean().item()) for scores in (ours, theirs))
        moved = f"{(ours - theirs).abs().mean():.3f}"
        table.add_row(name, f"{first:.2f}", f"{second:.2f}", f"{second / first - 1:+.1%}", moved)
    return table


def in_parts(ids: list[list[int]]) -> Table:
    """The same of uneven prompts, read in parts, and of what vLLM says after them, twice."""
    table = Table("served", "prompts", "first continuation", "second", "tokens cached for it")
    table.title = f"mean |log p apart|; prompts of {UNEVEN} tokens, {PART} at a time"
    text = iter([token for row in ids for token in row])
    asked = [[next(text) for _ in range(length)] for length in UNEVEN]
    for name in CONTINUED_ONES:
        compared = SERVED[name]
        found = run_vllm(
            FOLDER / name, asked, FOLDER, continued=CONTINUED, max_num_batched_tokens=PART
        )
        row = [_apart(found["log_probabilities"], scores_of(FOLDER / compared, asked))]
        for run in found["continuations"]:
            whole = [one + new["ids"] for one, new in zip(asked, run, strict=True)]
            scores = scores_of(FOLDER / compared, whole)
            after = [each[len(one) - 1 :] for each, one in zip(scores, asked, strict=True)]
            row.append(_apart([new["log_probabilities"] for new in run], after))
        cached = sum(new["cached"] for new in found["continuations"][1])
        table.add_row(name, *(f"{value:.3f}" for value in row), str(cached))
    return table


def _apart(found: list[list[float]], expected: list[torch.Tensor]) -> float:
    theirs = torch.cat([torch.tensor(row) for row in found])
    return (theirs - torch.cat(expected)).abs().mean().item()


def throughput(ids: list[list[int]]) -> Table:
    """Tokens a second of all prompts in one batch, the median of several turns."""
    table = Table("served", "prefill, tokens/s", "over without", "decode, tokens/s", "over without")
    table.title = f"{len(ids)} prompts of {LENGTH} tokens, {GENERATED} new ones, {TURNS} turns"
    models = {name: FOLDER / name for name in TIMED}
    found = speeds(models, ids, FOLDER, new=GENERATED, turns=TURNS)
    for name, seconds in found.items():
        row = []
        for part, tokens in (("prefill", LENGTH), ("decode", GENERATED - 1)):
            mine, plain = (torch.tensor(s[part]) for s in (seconds, found["without"]))
            row.append(f"{len(ids) * tokens / mine.median().item():.1f}")
            row.append(f"{(plain / mine).median().item():.3f}")
        table.add_row(name, *row)
    return table


def main() -> None:
    torch.manual_seed(0)
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    tokenizer = AutoTokenizer.from_pretrained(real.smollm2())
    prepare()
    windows = real.held_out_windows(tokenizer, LENGTH, EVALUATED)
    ids = [window["input_ids"][0].tolist() for window in windows]
    console = Console(width=110)
    console.print(agreement(ids))
    console.print(in_parts(ids))
    console.print(throughput(ids[:TOGETHER]))


if __name__ == "__main__":
    main()
