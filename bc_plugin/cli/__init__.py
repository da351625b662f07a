"""``bc-plugin``: plan, quantize, compensate, refine, export, evaluate, inspect and run."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from .. import __version__
from ..errors import BiasCompensationError
from .compensate import compensate
from .evaluate import evaluate
from .export import export
from .inspect import inspect
from .plan import plan
from .quantize import quantize
from .ranks import alone, name, shared
from .refine import refine
from .run import run
from .stopped import Stopped, stop_on_signals

app = typer.Typer(
    name="bc-plugin",
    help="Bias compensation for quantized language models (Gong et al., arXiv 2404.01892).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
for command in (
    alone(plan),
    alone(quantize),
    shared(compensate),
    shared(refine),
    alone(export),
    alone(evaluate),
    alone(inspect),
):
    app.command()(command)
# What follows belongs to the program, options included.
app.command(context_settings={"ignore_unknown_options": True})(run)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print it."),
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point: errors of this package, and signals, are one message without a traceback."""
    stop_on_signals()
    try:
        app()
    except BiasCompensationError as error:
        _say("error: ", error)
        raise SystemExit(1) from error
    except Stopped as stopped:
        _say("", stopped)
        raise SystemExit(stopped.exit_code) from stopped


def _say(what: str, error: BaseException) -> None:
    # As text, since [...] in a message is no markup; whole, so that paths can be copied.
    said = Text.assemble(name(), (what, "red"), str(error))
    Console(stderr=True).print(said, soft_wrap=True)
