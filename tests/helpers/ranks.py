"""Work in several processes at once, as torchrun has them, on a CPU."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes

from .killed import PROCESSES


def on_ranks(count: int, folder: Path, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What ``function`` of a module returns on each of ``count`` ranks, called with its number.

    Args:
        folder: An empty one, where the ranks meet.
        args: More of its arguments.
    """
    # Forked from a server that has imported everything, which takes most of a minute otherwise.
    method = PROCESSES.get_start_method()
    start_processes(_work, (count, folder, function, args), nprocs=count, start_method=method)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]


def _work(rank: int, count: int, folder: Path, function: Callable[..., Any], args: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=count)
    torch.save(function(rank, *args), folder / f"{rank}.pt")
    dist.destroy_process_group()


def as_launched(count: int, function: Callable[..., None], *args: Any) -> list[int]:
    """How processes end, their exit codes, in which ``function`` is called with a rank's number.

    They have the environment that torchrun gives them, and nobody who ends them.

    Raises:
        TimeoutError: one does not end.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        PROCESSES.Process(target=_launched, args=(rank, count, port, function, args))
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    end = time.monotonic() + 300
    for process in processes:
        process.join(max(0, end - time.monotonic()))
    left = [process for process in processes if process.is_alive()]
    for process in left:
        process.kill()
    if left:
        raise TimeoutError(f"{len(left)} of {count} ranks did not end")
    return [process.exitcode for process in processes]


def _launched(rank: int, count: int, port: int, function: Callable[..., None], args: tuple) -> None:
    torch.set_num_threads(1)
    mine = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in (mine | meeting).items()})
    function(rank, *args)
