"""``bc-plugin run``: somebody else's program, with the plugin enabled."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Annotated

import typer

from ..errors import BiasCompensationError

AUTO = Path(__file__).parent.parent / "auto"


def run(
    command: Annotated[list[str], typer.Argument(metavar="-- COMMAND", help="With arguments.")],
) -> None:
    """Run a program that does not know of this plugin, so that it loads compensated checkpoints.

    It costs nothing until the program, or a child process of it, imports a toolkit.

    Example: `bc-plugin run -- lm_eval --model hf --model_args pretrained=./out --tasks wikitext`
    """
    program = shutil.which(command[0])
    if program is None:
        raise BiasCompensationError(
            f"there is no program {command[0]!r} on the PATH; give its path, or `python -m ...`."
        )
    path = [str(AUTO), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.execve(program, command, {**os.environ, "PYTHONPATH": os.pathsep.join(path)})
