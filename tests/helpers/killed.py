"""Work in new processes that are killed at a moment of their own choosing.

Imports are made once, in a server that each of them is forked from before it has run anything.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
from collections.abc import Callable
from typing import Any

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["transformers.models.llama.modeling_llama", "bc_plugin.compensate", "bc_plugin.refine"]
)
KILLED = -signal.SIGKILL


def in_a_new_process(function: Callable[..., Any], *args: Any) -> int:
    """Run ``function`` in a process of its own, and tell how that ended: its exit code."""
    process = PROCESSES.Process(target=function, args=args)
    process.start()
    process.join()
    return process.exitcode


def kill_this() -> None:
    """Have this process killed."""
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at(
    owner: Any,
    name: str,
    call: int = 1,
    after: bool = False,
    kill: Callable[[], None] = kill_this,
) -> None:
    """Have this process killed by the ``call``-th call of a function, before it or after it.

    Args:
        kill: Kills it, and maybe others.
    """
    function, calls = getattr(owner, name), itertools.count(1)

    def killing(*args: Any, **kwargs: Any) -> Any:
        last = next(calls) == call
        if last and not after:
            kill()
        result = function(*args, **kwargs)
        if last:
            kill()
        return result

    setattr(owner, name, killing)
