"""The learning rates that refinement has by default, beside lower and higher ones.

    make benchmark-rates ARGS="--bits 4"

Held-out calibration text decides, none that the comparison evaluates on. It goes on from the
comparison's checkpoints, made first unless they are there; what was measured is not measured again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from comparison_part import TOGETHER, Part
from comparison_variants import EVERYTHING
from rich.console import Console
from rich.table import Table

import bc_plugin
from bc_plugin import RefinementConfig

START, STEPS, HELD_OUT = "joint-1-scales", 16, 8
RATES = ("learning_rate", "scales_learning_rate", "norms_learning_rate")
# All rates by these factors, and each kind's.
TRIED = [("all", factor) for factor in (0.25, 0.5, 1.0, 2.0)]
TRIED += [(name, factor) for factor in (0.5, 2.0) for name in RATES]
SEQUENCES = STEPS * TOGETHER + HELD_OUT  # each is seen once
SETTINGS = {
    "steps": STEPS,
    "evaluate_every": STEPS,
    "held_out": HELD_OUT / SEQUENCES,
    "train": EVERYTHING,
}


def rates(chosen: str, factor: float) -> dict[str, float]:
    """By name, the defaults, but for one of them, or all."""
    defaults = {name: getattr(RefinementConfig(), name) for name in RATES}
    return {n: rate * factor if chosen in (n, "all") else rate for n, rate in defaults.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=int, choices=(2, 3, 4), default=4)
    parser.add_argument("--seed", type=int, choices=(0, 1), default=0)
    parser.add_argument("--first", type=int, default=len(TRIED), help="as many settings")
    given = parser.parse_args()
    script = Path(__file__).with_name("comparison.py")
    settings = [f"--bits={given.bits}", f"--seed={given.seed}", "--only", START]
    subprocess.run([sys.executable, str(script), *settings], check=True)
    bc_plugin.enable()
    part = Part(given.bits, given.seed)
    path = part.folder / "rates.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    table = Table(*("vectors", "scales", "norms"), "held-out loss before", "after")
    table.title = f"{START}, {given.bits} bits, seed {given.seed}: {STEPS} steps"
    data = part.more[:SEQUENCES]
    for tried in TRIED[: given.first]:
        chosen = rates(*tried)
        key = json.dumps(chosen)
        if key not in found:
            config = RefinementConfig(**SETTINGS, **chosen)
            logits, _ = part.float_logits(config, data)
            refined = bc_plugin.refine(part.load(START), logits, data, config).refined
            found[key] = refined["before"], refined["after"]
            path.write_text(json.dumps(found))
        table.add_row(*(f"{rate:g}" for rate in chosen.values()), *(f"{x:.4f}" for x in found[key]))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
