"""``bc-plugin plan``: what the other commands will need."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from ..config import BiasCompensationConfig
from ..errors import BiasCompensationError
from ..refinement.config import RefinementConfig
from .arguments import BITS, GROUP_SIZES, check_dtype, float_config, one_of
from .inputs import pass_settings
from .options import BatchTokens, Dtype, Integers, Length, Positions, Samples, Scales, Sites

if TYPE_CHECKING:
    from ..plan import Plan


def plan(
    float_model: Annotated[str, typer.Argument(metavar="FLOAT", help="Folder or hub name.")],
    bits: Annotated[int, typer.Option(help=", ".join(map(str, BITS)))] = 4,
    group_size: Annotated[int, typer.Option(help="Weights that share a scale; -1: a row.")] = 128,
    positions: Positions = "1",
    sites: Sites = "linear block",
    scales: Scales = False,
    integers: Integers = False,
    refine_steps: Annotated[int, typer.Option(help="Steps of refinement; 0 for none.")] = 0,
    train: Annotated[
        str,
        typer.Option(help="What it trains: any of `vectors`, `scales`, `norms`; `auto`: all."),
    ] = "auto",
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="In refinement.")
    ] = False,
    devices: Annotated[int, typer.Option(min=1, help="Processes, each with a device.")] = 1,
    tflops: Annotated[
        float | None, typer.Option(help="Of one device, 10^12 per second; measured unless given.")
    ] = None,
    samples: Samples = 128,
    length: Length = 512,
    batch_tokens: BatchTokens = BiasCompensationConfig.batch_tokens,
    dtype: Dtype = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON.")] = False,
) -> None:
    """Memory, disk, operations and time that compensation, and refinement, will need.

    Everything follows from the config of FLOAT, whose weights need not be there.

    Example: `bc-plugin plan ./SmolLM2-135M --refine-steps 64 --devices 2`
    """
    settings = pass_settings(
        positions, sites, scales=scales, integers=integers, batch_tokens=batch_tokens
    )
    refinement = None
    if refine_steps != 0:
        refinement = RefinementConfig(
            steps=refine_steps,
            train=tuple(train.replace(",", " ").split()),
            gradient_checkpointing=gradient_checkpointing,
        )
    one_of("--bits", bits, BITS)
    one_of("--group-size", group_size, GROUP_SIZES)
    check_dtype(dtype)
    if tflops is not None and not tflops > 0:
        raise BiasCompensationError(f"--tflops {tflops}: expected a number above 0.")
    float_config(float_model)

    from .. import plan as run

    found = run(
        float_model,
        settings,
        refinement,
        bits=bits,
        group_size=group_size,
        samples=samples,
        length=length,
        devices=devices,
        dtype=dtype,
        flops_per_second=None if tflops is None else tflops * 1e12,
    )
    if as_json:
        typer.echo(json.dumps(found.to_dict()))
    else:
        _print(found)


def _print(found: Plan) -> None:
    right = {"justify": "right"}
    table = Table("", "", Column("memory of each", **right), Column("disk", **right))
    console = Console()
    for name, stage in found.stages.items():
        table.add_section()
        table.add_row(f"[bold]{name}", "", _bytes(sum(stage.memory.values())), "")
        for what, size in stage.memory.items():
            table.add_row("", what, _bytes(size), "")
        for what, size in stage.disk.items():
            table.add_row("", what, "", _bytes(size))
    console.print(table)
    table = Table("", "forward passes", Column("operations", **right), Column("time", **right))
    for name, stage in found.stages.items():
        passes = ", ".join(f"{what}: {count:,.4g}" for what, count in stage.passes.items())
        table.add_row(name, passes, f"{stage.flops:.3g}", _time(stage.seconds))
    console.print(table)
    console.print(
        f"{found.tokens:,} tokens in the pass. Vectors: {found.vectors:,} bytes, "
        f"{found.vectors / found.checkpoint:.2%} of the quantized model. Time: on {found.devices} "
        f"device(s) of {found.flops_per_second / 1e12:.3g} TFLOPS, without unpacking weights. "
        "Memory: beside that of the program."
    )


def _bytes(size: float) -> str:
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = 0
    while size >= 1024 and power < len(units) - 1:
        size, power = size / 1024, power + 1
    return f"{size:.4g} {units[power]}" if size < 1000 else f"{size:.0f} {units[power]}"


def _time(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
