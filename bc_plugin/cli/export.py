"""``bc-plugin export``: plain biases."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..files import check_out
from ..models.architectures import ENGINES
from ..names import KEY
from .arguments import check_loading, model_config, one_of
from .options import (
    DeviceMap,
    Out,
)
from .stopped import making


def export(
    compensated: Annotated[
        Path, typer.Argument(metavar="COMPENSATED", help="With positions=0, but for vllm.")
    ],
    out: Out,
    engine: Annotated[str, typer.Option("--for", help=", ".join(ENGINES))] = "transformers",
    allow_partial: Annotated[
        bool, typer.Option("--allow-partial", help="Leave out what the engine cannot be given.")
    ] = False,
    as_llama: Annotated[
        bool, typer.Option("--as-llama", help="Rewrite a model that is exactly a Llama as one.")
    ] = False,
    verify: Annotated[
        bool,
        typer.Option("--verify/--no-verify", help="Load the result and compare; takes memory."),
    ] = True,
    device_map: DeviceMap = "cpu",
) -> None:
    """Merge the vectors into plain biases, which engines load without this plugin.

    For vllm, vectors that can be no biases are kept, and vLLM is given them by this plugin.

    Example: `bc-plugin export ./compensated ./plain --for vllm`
    """
    one_of("--for", engine, ENGINES)
    model_config("COMPENSATED", compensated)
    check_out(out)
    check_loading("auto", device_map)

    from .. import export as run
    from ..vectors.settings import read_settings

    with making(out):
        run(
            compensated,
            out,
            engine=engine,
            allow_partial=allow_partial,
            as_llama=as_llama,
            verify=verify,
            device_map=device_map,
        )
    plain = read_settings(out).get(KEY) is None
    said = "verified" if verify else "not verified"
    if verify and plain:
        said += " in a process without the plugin"
    typer.echo(f"{out}: {said}")
    if not plain:
        typer.echo("Its vectors can be no biases, so vLLM needs the plugin.")
