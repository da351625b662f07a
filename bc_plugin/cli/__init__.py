"""``bc-plugin``: quantize, compensate, refine, export, evaluate, inspect and run."""

from __future__ import annotations

import typer
from rich.console import Console

from ..errors import BiasCompensationError
from .compensate import compensate
from .evaluate import evaluate
from .export import export
from .inspect import inspect
from .quantize import quantize
from .refine import refine
from .run import run

app = typer.Typer(
    name="bc-plugin",
    help="Bias compensation for quantized language models (Gong et al., arXiv 2404.01892).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
for command in (quantize, compensate, refine, export, evaluate, inspect):
    app.command()(command)
# What follows belongs to the program, options included.
app.command(context_settings={"ignore_unknown_options": True})(run)


def main() -> None:
    """Entry point: errors of this package are printed without a traceback."""
    try:
        app()
    except BiasCompensationError as error:
        Console(stderr=True).print(f"[red]error:[/red] {error}", highlight=False)
        raise SystemExit(1) from error
