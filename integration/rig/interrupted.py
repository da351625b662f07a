"""A command of ``bc-plugin`` that is stopped where it touches its files."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

SECONDS = 600
# What changes files, by Python's own account (PEP 578). Between two of these nothing changes, but
# for the bytes of a file that is being written.
EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "shutil.copyfile")
# Not gptqmodel: it starts a thread when it is imported, which no fork has.
PRELOADED = ("transformers.models.llama.modeling_llama", "datasets")


def run(
    arguments: list[Any], room: Path, at: tuple[int, float] | None = None, number: int = 0
) -> list[float] | None:
    """Run a command in a process of its own.

    Args:
        room: Where OUT is to be, and whatever the command keeps beside it; inputs are elsewhere.
        at: The touch of a file in there at which the process gets a signal, and how many seconds
            later; None lets it run.
        number: The signal.

    Returns:
        When it touched files there, empty where it did not come to its end; None if it hung.

    Raises:
        RuntimeError: it failed without having been stopped.
    """
    context = multiprocessing.get_context("forkserver")  # imports are paid for once
    context.set_forkserver_preload(list(PRELOADED))
    ours, theirs = context.Pipe(duplex=False)
    words = ["bc-plugin", *(str(word) for word in arguments)]
    log = room.with_name(f"{room.name}.log")
    process = context.Process(target=_child, args=(words, str(room), at, number, theirs, str(log)))
    process.start()
    theirs.close()
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
        return None
    touches = []
    with contextlib.suppress(EOFError):
        touches = ours.recv()
    if at is None and not touches:
        raise RuntimeError(f"{' '.join(words)} failed: {log.read_text()[-1000:]}")
    return touches


def _child(words, room, at, number, connection, log) -> None:
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(stream, descriptor)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from bc_plugin.cli import main

    sys.argv, touches = words, []

    def hook(event: str, args: tuple) -> None:
        if event not in EVENTS or not _path(args).startswith(room + os.sep):
            return
        touches.append(time.monotonic())
        if at is not None and len(touches) == at[0] + 1:
            if at[1] == 0:
                os.kill(os.getpid(), number)
            else:
                threading.Timer(at[1], os.kill, (os.getpid(), number)).start()

    sys.addaudithook(hook)
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise
    connection.send(touches)


def _path(args: tuple) -> str:
    return os.fsdecode(args[0]) if isinstance(args[0], (str, bytes)) else ""
