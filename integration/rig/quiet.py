"""A terminal that stays readable: steps on it, and what toolkits print in a file."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

TAIL = 30


@contextmanager
def quiet(log: Path) -> Iterator[Console]:
    """Send standard output and error to ``log``; what is said on the console is still seen.

    It is done to the descriptors, so it holds for C code, threads and child processes too. And it
    lasts as long as the process: toolkits have threads and exit handlers that print.

    Raises:
        SystemExit: there was an error. The end of ``log`` and the traceback have been printed
            where errors went before.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_bytes(b"")
    output, error = (_diverted(stream, log) for stream in (sys.stdout, sys.stderr))
    try:
        yield Console(file=output, width=100)
    except Exception:
        print(f"The end of {log}:", *_tail(log), sep="\n", file=error)
        traceback.print_exc(file=error)
        raise SystemExit(1) from None


@contextmanager
def step(console: Console, title: str) -> Iterator[None]:
    """Say what is being done: on a terminal with the time it has taken, elsewhere once."""
    if not console.is_interactive:
        console.print(title)
        yield
        return
    columns = (SpinnerColumn(finished_text="✓"), TextColumn("{task.description}"))
    # It would put another stream in the place of sys.stdout, one that writes to the console.
    streams = {"redirect_stdout": False, "redirect_stderr": False}
    with Progress(*columns, TimeElapsedColumn(), console=console, **streams) as progress:
        task = progress.add_task(title, total=1)
        yield
        progress.update(task, completed=1)


def _diverted(stream: TextIO, log: Path) -> TextIO:
    """Let the descriptor of ``stream`` write to ``log``; returns a stream to where it wrote."""
    stream.flush()
    copy = os.dup(stream.fileno())
    former = os.fdopen(copy, "w", buffering=1, encoding=stream.encoding, errors="replace")
    with log.open("ab") as file:
        os.dup2(file.fileno(), stream.fileno())
    return former


def _tail(log: Path) -> list[str]:
    """The last lines, and of progress bars the last state."""
    lines = log.read_bytes().decode(errors="replace").split("\n")
    return [line.rstrip("\r").rpartition("\r")[2] for line in lines[-TAIL:]]
