"""Everything that repairs a GPTQ model, side by side on SmolLM2-135M.

    make benchmark-comparison

prints one table per width and calibration seed. What an interrupted run has measured is not
measured again; ``--again`` starts anew. ``--bits`` and ``--seed`` take one part of it. ``--next``
is the Python of an environment with gptqmodel 7.7, whose norm tuning is left out without it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys

from comparison_part import FOLDER, GROUP_SIZE, RANK, STEPS, Part
from rich.console import Console
from rich.table import Table

import bc_plugin

# Otherwise glibc gives every large tensor's pages back to the system, and asks for the next one's.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**34)}
LABELS = {
    "float": "float32",
    "none": "GPTQ",
    "linear": "+ bias correction per linear (DFQ's closed form)",
    "all": '+ BC, positions="all" (the paper\'s setting)',
    "BC 0": "+ BC, positions=0",
    "BC 1": "+ BC, positions=1",
    "self": "+ BC, positions=1, on text of its own",
    "norm": f"+ norm tuning, {STEPS} steps (gptqmodel 7.7)",
    "eora": f"+ EoRA, rank {RANK} (gptqmodel)",
    "gptaq": "GPTAQ (gptqmodel)",
    "joint 0": "joint, positions=0",
    "joint 1": "joint, positions=1",
    "block 1": "joint, positions=1, refined by block",
    "refined 0": "joint, positions=0, refined",
    "refined 1": "joint, positions=1, refined",
}


def print_table(bits: int, seed: int) -> None:
    found = json.loads((FOLDER / f"{bits}-{seed}" / "found.json").read_text())
    columns = ("perplexity", "gap closed", "KL (nats)", "extra bytes", "extra s", "extra work")
    table = Table("", *columns)
    floor, plain = found["float"]["perplexity"], found["none"]["perplexity"]
    for variant, label in LABELS.items():
        if variant not in found:
            continue
        row = found[variant]
        if "error" in row:
            table.add_row(label, "", "", "", "", "", row["error"].splitlines()[0][:40])
            continue
        repaired = variant not in ("float", "none")
        closed = (plain - row["perplexity"]) / (plain - floor)
        table.add_row(
            label,
            f"{row['perplexity']:.2f}",
            f"{closed:.0%}" if repaired else "",
            "" if variant == "float" else f"{row['kl']:.3f}",
            f"{row['bytes']:,}" if repaired else "",
            f"{row['seconds']:.0f}" if repaired else "",
            f"{row['work']:.2%}" if repaired else "",
        )
    table.title = (
        f"SmolLM2-135M, {bits} bits, group {GROUP_SIZE}, calibration seed {seed}; "
        f"{found['none']['tokens']} tokens of held-out Wikipedia"
    )
    table.caption = (
        "extra s: beyond plain GPTQ's quantizing; extra work: operations per token, as a share of "
        "the multiplications of the quantized linears"
    )
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=int, choices=(3, 4))
    parser.add_argument("--seed", type=int, choices=(0, 1))
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--next", help="a Python with gptqmodel 7.7")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--norm", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        bc_plugin.enable()
        Part(given.bits, given.seed).run()
        return
    if given.norm:
        part = Part(given.bits, given.seed)
        if "norm" not in part.found:
            part.attempt("norm", part.norm)
        return
    if given.again:
        shutil.rmtree(FOLDER, ignore_errors=True)
    parts = [
        (bits, seed)
        for bits in (3, 4)
        for seed in (0, 1)
        if given.bits in (None, bits) and given.seed in (None, seed)
    ]
    environment = {**os.environ, **KEEP_MEMORY}
    for bits, seed in parts:
        arguments = [__file__, f"--bits={bits}", f"--seed={seed}"]
        subprocess.run([sys.executable, *arguments, "--measure"], check=True, env=environment)
        if given.next:
            subprocess.run([given.next, *arguments, "--norm"], check=True, env=environment)
    for part in parts:
        print_table(*part)


if __name__ == "__main__":
    main()
