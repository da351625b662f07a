"""The table of a compensation's sites."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Column, Table

from ..errors import BiasCompensationError
from ..gguf.file import GGUFFile, is_gguf

if TYPE_CHECKING:
    from .. import Compensation


def print_sites(model: Path, by_group: bool) -> None:
    """Args: model: A compensated checkpoint, or a compensated GGUF file."""
    from ..vectors.short_names import collapse

    compensation = load_compensation(model)
    rows = {row["site"]: row for row in compensation.describe()}
    groups = collapse(rows) if by_group else {name: [name] for name in rows}
    columns = ("before", "after", "held_out_before", "held_out_after")
    table = Table(
        Column("site", overflow="fold"),
        "kind",
        "shape",
        "bytes",
        "error",
        "after",
        "held out",
        "after",
    )
    for short, names in groups.items():
        members = [rows[name] for name in names]
        means = [_mean([member[column] for member in members]) for column in columns]
        shapes = dict.fromkeys(" x ".join(map(str, member["shape"])) for member in members)
        size = f"{sum(member['bytes'] for member in members):,}"
        table.add_row(short, members[0]["kind"], ", ".join(shapes), size, *means)
    console = Console(markup=False)  # layers.[a] is a name
    console.print(table)
    console.print(
        f"{len(rows)} sites, {compensation.nbytes:,} bytes, positions={compensation.positions}, "
        f"joint={compensation.joint}, scales={compensation.scales}. "
        "Errors are mean squared differences from the float model's output, per value."
    )
    if compensation.refined is not None:
        console.print(
            "Refined by {by} in {steps} steps: loss on held-out sequences {before:.4g}, then "
            "{after:.4g}. The errors are those of the vectors it started from.".format(
                **compensation.refined
            )
        )


def load_compensation(model: Path) -> Compensation:
    """The vectors of a checkpoint or a GGUF file.

    Raises:
        BiasCompensationError: it has none, or is damaged.
    """
    from .. import Compensation

    if not is_gguf(model):
        return Compensation.load(model)
    from ..gguf.compensated import compensation_in

    compensation = compensation_in(GGUFFile(model))
    if compensation is None:
        raise BiasCompensationError(
            f"{model} holds no compensation; `bc-plugin compensate {model} FLOAT OUT.gguf "
            "--dataset TEXT` makes a file that does."
        )
    return compensation


def _mean(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{sum(known) / len(known):.3g}" if known else "-"
