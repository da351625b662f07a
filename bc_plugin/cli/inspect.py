"""``bc-plugin inspect``: sites, sizes and errors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..gguf.file import GGUFFile, is_gguf
from .arguments import existing_folder
from .sites import print_sites


def inspect(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="A compensated checkpoint, or GGUF file.")
    ],
    all_sites: Annotated[
        bool, typer.Option("--all", help="A row per site, not per group.")
    ] = False,
) -> None:
    """The sites of a compensated checkpoint, their sizes, and the error before and after.

    Example: `bc-plugin inspect ./out`
    """
    if is_gguf(model):
        file = GGUFFile(model)
        types = ", ".join(f"{count} {name}" for name, count in file.types().items())
        typer.echo(f"{model}: {file.architecture}, tensors: {types}")
    else:
        existing_folder("MODEL", model)
    print_sites(model, by_group=not all_sites)
