"""The main job on a real model: quantize, compensate, save, load in a new process, compare.

    python integration/demo.py [--defaults]

prints one table and writes ``.cache/demo/errors.png``. What the toolkits print is in
``.cache/demo/log.txt``. With ``--defaults`` GPTQ has gptqmodel's own defaults instead of the
settings of its paper.
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

import torch
from rich.console import Console
from rich.table import Table
from rig.folders import CACHE
from rig.quiet import quiet, step
from rig.subjects import real
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTQConfig

import bc_plugin
from bc_plugin import Compensation

FOLDER = CACHE / "demo"
BITS, GROUP_SIZE, SAMPLES, LENGTH, EVALUATED = 3, 64, 32, 512, 12
LABELS = {
    "GPTQ": "GPTQ",
    "positions=0": "+ BC afterwards, positions=0",
    "positions=1": "+ BC afterwards",
    "option": "GPTQ, bias_compensation=True",
    "alone": "the same weights without vectors",
}
# Plain GPTQ as in its paper: asymmetric, columns in their natural order, one percent of damping.
PLAIN_GPTQ = {"sym": False, "act_group_aware": False, "damp_percent": 0.01}


def quantized(bias_compensation: bool | None):
    """SmolLM2 by transformers' GPTQConfig, with or without the option; and the seconds it took."""
    source = real.smollm2()
    config = GPTQConfig(
        bits=BITS,
        group_size=GROUP_SIZE,
        dataset=_calibration(),
        modules_in_block_to_quantize=real.TOGETHER,
        bias_compensation=bias_compensation,
        **({} if "--defaults" in sys.argv else PLAIN_GPTQ),
    )
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    seconds = time.perf_counter() - start
    model.config.quantization_config.dataset = None  # tokens, which JSON cannot hold
    return model, seconds


def _calibration() -> list:
    tokenizer = AutoTokenizer.from_pretrained(real.smollm2())
    return real.calibration_windows(tokenizer, LENGTH, SAMPLES)


def quantize_and_save(console: Console) -> dict[str, tuple[float, float]]:
    """Save every variant; returns the seconds of quantizing and of the pass."""
    with step(console, f"1. Quantize to {BITS} bits, with bias_compensation=True"):
        model, total = quantized(True)
        compensation = Compensation.attached_to(model)
        seconds = {"option": (total - compensation.seconds, compensation.seconds)}
        model.save_pretrained(FOLDER / "option")
        plot(compensation, FOLDER / "errors.png")

    with step(console, "2. Quantize without it"):
        model, total = quantized(None)
        seconds["GPTQ"] = (total, 0.0)
        model.save_pretrained(FOLDER / "GPTQ")

    with step(console, "3. Compensate the result afterwards"):
        reference = AutoModelForCausalLM.from_pretrained(real.smollm2())
        for positions in (0, 1):
            name = f"positions={positions}"
            config = {"positions": positions}
            compensation = bc_plugin.compensate(model, reference, _calibration(), config)
            compensation.attach(model)
            model.save_pretrained(FOLDER / name)
            compensation.detach(model)
            seconds[name] = (total, compensation.seconds)
    return seconds


def evaluate_saved() -> None:
    """In a process of its own: load what was saved, and measure it on held-out articles."""
    source = real.smollm2()
    tokenizer = AutoTokenizer.from_pretrained(source)
    batches = real.held_out_windows(tokenizer, LENGTH, EVALUATED)
    reference = AutoModelForCausalLM.from_pretrained(source).eval()
    found = {"float": bc_plugin.evaluate(reference, batches).to_dict()}
    for name in ("GPTQ", "positions=0", "positions=1", "option"):
        model = AutoModelForCausalLM.from_pretrained(FOLDER / name)
        found[name] = bc_plugin.evaluate(model, batches, reference).to_dict()
    Compensation.attached_to(model).detach(model)
    found["alone"] = bc_plugin.evaluate(model, batches, reference).to_dict()
    (FOLDER / "evaluation.json").write_text(json.dumps(found))


def plot(compensation: Compensation, path: Path) -> None:
    """Error per site before and after, on held-out tokens."""
    import matplotlib  # here, for at first it may say that it looks for fonts

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

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


def print_table(console: Console, found: dict, seconds: dict[str, tuple[float, float]]) -> None:
    floor, plain = found["float"]["perplexity"], found["GPTQ"]["perplexity"]
    table = Table("", "perplexity", "gap closed", "KL (nats)", "checkpoint", "quantize", "BC pass")
    tokens = found["float"]["tokens"]
    table.title = (
        f"SmolLM2-135M, {BITS} bits, group {GROUP_SIZE}; {tokens} tokens of held-out Wikipedia"
    )
    megabytes = real.smollm2().joinpath("model.safetensors").stat().st_size / 1e6
    table.add_row("float32", f"{floor:.2f}", "", "0", f"{megabytes:.2f} MB", "", "")
    for name, label in LABELS.items():
        row, (quantize, work) = found[name], seconds.get(name, (0.0, 0.0))
        closed = (plain - row["perplexity"]) / (plain - floor)
        table.add_row(
            label,
            f"{row['perplexity']:.2f}",
            f"{closed:.0%}" if work else "",
            f"{row['kl']:.3f}",
            f"{size(name) / 1e6:.2f} MB" if quantize else "",
            f"{quantize:.0f} s" if quantize else "",
            f"{work:.0f} s" if work else "",
        )
    console.print(table)


def main() -> None:
    torch.manual_seed(0)
    if sys.argv[1:] == ["evaluate"]:
        bc_plugin.enable()
        evaluate_saved()
        return
    shutil.rmtree(FOLDER, ignore_errors=True)
    with quiet(FOLDER / "log.txt") as console:
        console.print(f"What the toolkits print: {FOLDER / 'log.txt'}", soft_wrap=True)
        bc_plugin.enable()
        seconds = quantize_and_save(console)
        with step(console, "4. Load in a new process and evaluate"):
            subprocess.run([sys.executable, __file__, "evaluate"], check=True)
        print_table(console, json.loads((FOLDER / "evaluation.json").read_text()), seconds)
        console.print(f"Plot: {FOLDER / 'errors.png'}", soft_wrap=True)


if __name__ == "__main__":
    main()
