"""Learning rates of refinement, side by side.

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
# Of vectors, scales and norms; 0 where they are not trained.
TRIED = (
    (0.1, 1e-3, 2e-3),
    (0.05, 5e-4, 1e-3),
    (0.025, 2.5e-4, 5e-4),
    (0.025, 5e-4, 5e-4),
    (0.01, 2.5e-4, 5e-4),
    (0.1, 0, 0),
    (0.025, 0, 0),
)
SEQUENCES = STEPS * TOGETHER + HELD_OUT  # each is seen once
SETTINGS = {
    "steps": STEPS,
    "evaluate_every": STEPS,
    "held_out": HELD_OUT / SEQUENCES,
}


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
        chosen = {name: rate for name, rate in zip(RATES, tried, strict=True) if rate}
        key = json.dumps(chosen)
        if key not in found:
            train = [kind for kind, rate in zip(EVERYTHING, tried, strict=True) if rate]
            config = RefinementConfig(**SETTINGS, train=tuple(train), **chosen)
            logits, _ = part.float_logits(config, data)
            refined = bc_plugin.refine(part.load(START), logits, data, config).refined
            found[key] = refined["before"], refined["after"]
            path.write_text(json.dumps(found))
        table.add_row(*(f"{rate:g}" for rate in tried), *(f"{x:.4f}" for x in found[key]))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
