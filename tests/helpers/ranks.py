"""Work in several processes at once, as torchrun has them, on a CPU."""

from __future__ import annotations

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
