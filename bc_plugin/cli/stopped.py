"""Ctrl-C and SIGTERM: everything is cleaned up, and one line says how to go on."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(BaseException):
    """A signal asked the command to stop; no ``Exception``, since toolkits catch those."""

    left = ""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number

    def __str__(self) -> str:
        return f"stopped by {self.args[0]}{self.left and f'; {self.left}'}."


def stop_on_signals() -> None:
    """Raise ``Stopped`` on the first signal; the second ends the process at once."""
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as under `nohup` or `&`
            signal.signal(number, _stop)


def _stop(number: int, _frame: FrameType | None) -> None:
    for each in SIGNALS:
        signal.signal(each, signal.SIG_DFL)
    raise Stopped(number)


@contextmanager
def making(out: Path, if_stopped: str = "nothing was written") -> Iterator[None]:
    """What to say where the command is stopped before ``out`` is there."""
    try:
        yield
    except Stopped as stopped:
        stopped.left = f"{out} is whole" if out.exists() else if_stopped
        raise
