"""The main job on a real model: quantize, compensate, save, load in a new process, compare.

    python integration/demo.py [--defaults]

prints one table and writes ``.cache/demo/errors.png``. With ``--defaults`` GPTQ has gptqmodel's own
defaults instead of the settings of its paper.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import real
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTQConfig

import bc_plugin
from bc_plugin import Compensation

FOLDER = real.CACHE / "demo"
BITS, GROUP_SIZE, SAMPLES, LENGTH, EVALUATED = 3, 64, 32, 512, 12
# Plain GPTQ as in its paper: asymmetric, columns in their natural order, one percent of damping.
PLAIN_GPTQ = {"sym": False, "act_group_aware": False, "damp_percent": 0.01}


def quantize_and_save(console: Console) -> dict[str, float]:
    """Quantize with the flag, save, and compensate the same weights once more with positions=0."""
    source = real.smollm2()
    tokenizer = AutoTokenizer.from_pretrained(source)
    calibration = real.calibration_windows(tokenizer, LENGTH, SAMPLES)
    seconds = {}

    console.print(f"[bold]1. Quantize to {BITS} bits, with bias_compensation=True[/bold]")
    config = GPTQConfig(
        bits=BITS,
        group_size=GROUP_SIZE,
        dataset=calibration,
        tokenizer=tokenizer,
        bias_compensation=True,
        **({} if "--defaults" in sys.argv else PLAIN_GPTQ),
    )
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    compensation = Compensation.attached_to(model)
    seconds["positions=1"] = compensation.seconds
    seconds["GPTQ"] = time.perf_counter() - start - compensation.seconds
    model.config.quantization_config.dataset = None  # tokens, which JSON cannot hold
    model.save_pretrained(FOLDER / "positions=1")
    plot(compensation, FOLDER / "errors.png")

    console.print("[bold]2. The same weights without compensation, and with positions=0[/bold]")
    compensation.detach(model)
    model.save_pretrained(FOLDER / "GPTQ")
    reference = AutoModelForCausalLM.from_pretrained(source)
    compensation = bc_plugin.compensate(model, reference, calibration, {"positions": 0})
    compensation.attach(model)
    seconds["positions=0"] = compensation.seconds
    model.save_pretrained(FOLDER / "positions=0")
    return seconds


def evaluate_saved() -> None:
    """In a process of its own: load what was saved, and measure it on held-out articles."""
    source = real.smollm2()
    tokenizer = AutoTokenizer.from_pretrained(source)
    batches = real.held_out_windows(tokenizer, LENGTH, EVALUATED)
    reference = AutoModelForCausalLM.from_pretrained(source).eval()
    found = {"float": bc_plugin.evaluate(reference, batches).to_dict()}
    for name in ("GPTQ", "positions=0", "positions=1"):
        model = AutoModelForCausalLM.from_pretrained(FOLDER / name)
        found[name] = bc_plugin.evaluate(model, batches, reference).to_dict()
    (FOLDER / "evaluation.json").write_text(json.dumps(found))


def plot(compensation: Compensation, path: Path) -> None:
    """Error per site before and after, on held-out tokens."""
    rows = compensation.describe()
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    # A block is measured with its linears compensated already.
    labels = {"linear": ("GPTQ", "with its vector"), "block": ("linears only", "with its vector")}
    for axis, (kind, names) in zip(axes, labels.items(), strict=True):
        chosen = [row for row in rows if row["kind"] == kind]
        for column, label in zip(("held_out_before", "held_out_after"), names, strict=True):
            axis.semilogy([row[column] for row in chosen], ".-", label=label, linewidth=0.8)
        axis.set(title=f"{kind} outputs", xlabel="site, first to last", ylabel="mean squared error")
        axis.legend()
    figure.suptitle("Error against the float model on held-out tokens, before and after BC")
    figure.savefig(path, dpi=120)


def size(name: str) -> int:
    return sum(file.stat().st_size for file in (FOLDER / name).glob("*.safetensors"))


def print_table(console: Console, found: dict, seconds: dict[str, float]) -> None:
    floor, plain = found["float"]["perplexity"], found["GPTQ"]["perplexity"]
    table = Table("", "perplexity", "gap closed", "KL (nats)", "checkpoint", "quantize", "BC pass")
    tokens = found["float"]["tokens"]
    table.title = (
        f"SmolLM2-135M, {BITS} bits, group {GROUP_SIZE}; {tokens} tokens of held-out Wikipedia"
    )
    megabytes = real.smollm2().joinpath("model.safetensors").stat().st_size / 1e6
    table.add_row("float32", f"{floor:.2f}", "", "0", f"{megabytes:.2f} MB", "", "")
    for label in ("GPTQ", "positions=0", "positions=1"):
        row = found[label]
        closed = (plain - row["perplexity"]) / (plain - floor)
        table.add_row(
            label if label == "GPTQ" else f"+ BC, {label}",
            f"{row['perplexity']:.2f}",
            "" if label == "GPTQ" else f"{closed:.0%}",
            f"{row['kl']:.3f}",
            f"{size(label) / 1e6:.2f} MB",
            f"{seconds['GPTQ']:.0f} s",
            "" if label == "GPTQ" else f"{seconds[label]:.0f} s",
        )
    console.print(table)


def main() -> None:
    torch.manual_seed(0)
    bc_plugin.enable()
    if sys.argv[1:] == ["evaluate"]:
        evaluate_saved()
        return
    console = Console(width=100)
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    seconds = quantize_and_save(console)
    console.print("[bold]3. Load in a new process and evaluate[/bold]")
    subprocess.run([sys.executable, __file__, "evaluate"], check=True)
    print_table(console, json.loads((FOLDER / "evaluation.json").read_text()), seconds)
    console.print(f"Plot: {FOLDER / 'errors.png'}")


if __name__ == "__main__":
    main()
