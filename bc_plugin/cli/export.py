"""``bc-plugin export``: plain biases."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..models.architectures import ENGINES
from .options import (
    DeviceMap,
    Out,
)


def export(
    compensated: Annotated[Path, typer.Argument(metavar="COMPENSATED", help="With positions=0.")],
    out: Out,
    engine: Annotated[str, typer.Option("--for", help=", ".join(ENGINES))] = "transformers",
    allow_partial: Annotated[
        bool, typer.Option("--allow-partial", help="Leave out what the engine cannot be given.")
    ] = False,
    as_llama: Annotated[
        bool, typer.Option("--as-llama", help="Rewrite a model that is exactly a Llama as one.")
    ] = False,
    device_map: DeviceMap = "cpu",
) -> None:
    """Merge the vectors into plain biases, which engines load without this plugin.

    Example: `bc-plugin export ./compensated ./plain --for vllm`
    """
    from .. import export as run

    run(
        compensated,
        out,
        engine=engine,
        allow_partial=allow_partial,
        as_llama=as_llama,
        device_map=device_map,
    )
    Console().print(f"{out}: verified in a process without the plugin", highlight=False)
