"""Shapes of models that do not fit: memory, seconds, several processes, and what kills leave.

    make benchmark-scale ARGS="--only layers --layers 2 4"

Checkpoints of random weights are written block by block and deleted again; results are kept in
``.cache/scale`` and not measured again, but with ``--again``. Processors without bfloat16 multiply
it hundreds of times more slowly, so models are loaded in ``--dtype float32``, whatever the files
have. ``--shape tiny`` is for changing this file.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table
from rig.subjects.large import SHAPES
from scale_kills import MOMENTS, OUTCOMES, kills
from scale_parts import BATCH, FOLDER, LENGTH, measure_pass, measure_ranks

PARTS = ("layers", "tokens", "70b", "ranks", "kills")
MEMORY = ("float block", "quantized block", "activations")
CONSOLE = Console(width=170)


def keep(name: str, again: bool, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was measured under this name, before or now."""
    path = FOLDER / f"{name}.json"
    if again or not path.exists():
        CONSOLE.print(f"measuring {name}", style="dim")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(measure(), indent=1))
    return json.loads(path.read_text())


def passes(given: argparse.Namespace, only: tuple[str, ...]) -> list[dict[str, Any]]:
    """The rows of the table of memory."""
    shape, fewest = given.shape, min(given.layers)
    rows = [(shape, count, given.sequences * LENGTH) for count in given.layers]
    wanted = rows if "layers" in only else []
    wanted += [(shape, fewest, tokens * LENGTH) for tokens in (2, 4) if "tokens" in only]
    large = "70b" if shape == "8b" else shape
    wanted += [(large, 2, 4 * LENGTH)] if "70b" in only else []
    return [
        keep(
            f"{name}-{layers}-{tokens}-{given.dtype}",
            given.again,
            lambda name=name, layers=layers, tokens=tokens: measure_pass(
                name, layers, tokens, given.dtype, given.vocabulary
            ),
        )
        for name, layers, tokens in dict.fromkeys(wanted)
    ]


def print_passes(rows: list[dict[str, Any]]) -> None:
    columns = ("blocks", "tokens", *MEMORY, "sum", "peak", "of the sum", "without files")
    table = Table("", *columns, "largest rss", "s per block", title="Memory in MB, random weights")
    for row in rows:
        total = sum(row["plan"][name] for name in MEMORY)
        for command in ("compensate", "export"):
            found = row[command]
            table.add_row(
                f"{command}, {row['shape']}",
                f"{row['layers']}",
                f"{row['tokens']:,}" if command == "compensate" else "",
                *(_mb(row["plan"][name]) for name in MEMORY),
                _mb(total),
                _mb(found["resident"]),
                f"{found['resident'] / total:.2f}",
                _mb(found["anonymous"]),
                _mb(found["largest"]),
                f"{found['per_block'] or found['seconds'] / row['layers']:.1f}",
            )
    table.caption = (
        f"{BATCH} tokens in a forward pass; peak: resident beyond what imports had taken; without "
        "files: pages of its own; largest rss: ru_maxrss, imports and mapped files included. Of "
        "export the sum is that of the pass."
    )
    CONSOLE.print(table)


def print_ranks(row: dict[str, Any]) -> None:
    table = Table("processes", "threads", "seconds", title=f"Pass of {row['layers']} blocks")
    for count in ("1", "2"):
        table.add_row(count, str(2 // int(count)), f"{row['seconds'][count]:.1f}")
    table.caption = (
        f"largest difference of a vector's value: {row['difference']:.3g}, where the largest "
        f"value is {row['largest']:.3g}"
    )
    CONSOLE.print(table)


def print_kills(row: dict[str, Any]) -> None:
    table = Table("killed", "command", *OUTCOMES, title="kill -9, then the same command again")
    for found in row["counts"]:
        counts = found["outcomes"]
        table.add_row(
            found["killed"], found["command"], *(str(counts.get(name, 0)) for name in OUTCOMES)
        )
    CONSOLE.print(table)


def _mb(size: float) -> str:
    return f"{size / 1e6:,.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--sequences", type=int, default=4, help=f"of {LENGTH} tokens, with those")
    parser.add_argument("--vocabulary", type=int, help="instead of the shape's")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--moments", type=int, default=MOMENTS)
    parser.add_argument("--ranks", type=int, default=2, help="that are killed, or one of them")
    parser.add_argument("--again", action="store_true")
    given = parser.parse_args()
    only = tuple(given.only)
    if rows := passes(given, only):
        print_passes(rows)
    small = "tiny" if given.shape == "tiny" else "small"
    if "ranks" in only:
        print_ranks(keep(f"ranks-{small}", given.again, lambda: measure_ranks(small)))
    if "kills" in only:
        name = f"kills-{given.ranks}-{given.moments}"
        print_kills(keep(name, given.again, lambda: kills(given.ranks, given.moments)))


if __name__ == "__main__":
    main()
