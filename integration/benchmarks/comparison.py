"""Everything that repairs a GPTQ model, side by side on SmolLM2-135M.

    make benchmark-comparison ARGS="--bits 3 --seed 0 --only gptq joint-1 refined-1"

prints one table per width and calibration seed; without arguments all of them, which takes many
hours. What was measured before is not measured again, nor is a checkpoint made again, but with
``--again``. ``--next`` is the Python of an environment with gptqmodel 7.7, whose norm tuning is
left out without it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import traceback

from comparison_part import FOLDER, GROUP_SIZE, Part
from comparison_variants import VARIANTS
from rich.console import Console
from rich.table import Table

import bc_plugin

# Otherwise glibc gives every large tensor's pages back to the system, and asks for the next one's.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**34)}
ALWAYS = ("float", "gptq")
ELSEWHERE = "norm"  # needs another environment


def seconds_of(found: dict, variant: str) -> float:
    """What a variant took beyond plain GPTQ's quantizing."""
    start = VARIANTS[variant].start
    return found[variant]["seconds"] + (seconds_of(found, start) if start else 0.0)


def print_table(bits: int, seed: int) -> None:
    found = json.loads((FOLDER / f"{bits}-{seed}" / "found.json").read_text())
    columns = ("perplexity", "gap closed", "KL (nats)", "extra bytes", "extra s", "extra work")
    table = Table("", *columns)
    floor, plain = found["float"]["perplexity"], found["gptq"]["perplexity"]
    for variant, row in ((name, found[name]) for name in VARIANTS if name in found):
        label = f"{VARIANTS[variant].label} [dim]({variant})[/dim]"
        if "error" in row:
            table.add_row(label, "", "", "", "", "", row["error"].splitlines()[0][:40])
            continue
        repaired = variant not in ALWAYS
        closed = (plain - row["perplexity"]) / (plain - floor)
        table.add_row(
            label,
            f"{row['perplexity']:.2f}",
            f"{closed:.0%}" if repaired else "",
            "" if variant == "float" else f"{row['kl']:.3f}",
            f"{row['bytes']:,}" if repaired else "",
            f"{seconds_of(found, variant):.0f}" if repaired else "",
            f"{row['work']:.2%}" if repaired else "",
        )
    table.title = (
        f"SmolLM2-135M, {bits} bits, group {GROUP_SIZE}, calibration seed {seed}; "
        f"{found['gptq']['tokens']} tokens of held-out Wikipedia"
    )
    table.caption = (
        "extra s: beyond plain GPTQ's quantizing; extra work: operations per token, as a share of "
        "the multiplications of the quantized linears"
    )
    Console(width=132).print(table)


def measure(part: Part, variant: str) -> None:
    """Measure a variant, and before it what it starts from.

    What does not run is said, and tried again by the next run.
    """
    if variant in part.found and "error" not in part.found[variant]:
        return
    start = VARIANTS[variant].start
    if start:
        measure(part, start)
    print(f"{part.bits} bits, seed {part.seed}: {variant}", flush=True)
    try:
        VARIANTS[variant].make(part, variant)
    except Exception as error:
        traceback.print_exc()
        part.keep(variant, {"error": f"{type(error).__name__}: {error}"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=int, nargs="+", choices=(2, 3, 4), default=(2, 3, 4))
    parser.add_argument("--seed", type=int, nargs="+", choices=(0, 1), default=(0, 1))
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--next", help="a Python with gptqmodel 7.7")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        bc_plugin.enable()
        for bits, seed in ((bits, seed) for bits in given.bits for seed in given.seed):
            part = Part(bits, seed)
            for variant in given.only:
                measure(part, variant)
        return
    if given.again:
        shutil.rmtree(FOLDER, ignore_errors=True)
    here = dict.fromkeys([*ALWAYS, *(name for name in given.only if name != ELSEWHERE)])
    runs = [(sys.executable, list(here))]
    if given.next and ELSEWHERE in given.only:
        runs.append((given.next, [ELSEWHERE]))
    for bits, seed in ((bits, seed) for bits in given.bits for seed in given.seed):
        for python, variants in runs:
            arguments = [f"--bits={bits}", f"--seed={seed}", "--measure", "--only", *variants]
            subprocess.run(
                [python, __file__, *arguments], check=True, env={**os.environ, **KEEP_MEMORY}
            )
    for bits, seed in ((bits, seed) for bits in given.bits for seed in given.seed):
        print_table(bits, seed)


if __name__ == "__main__":
    main()
