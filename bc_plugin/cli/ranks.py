"""A command that torchrun has started several times: the ranks of one run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, redirect_stdout
from datetime import timedelta
from functools import wraps
from pathlib import Path
from signal import SIGTERM
from typing import Any

from ..errors import BiasCompensationError
from .arguments import SPREAD

PATIENCE = timedelta(minutes=30)  # with a rank that is there and does not answer
SET = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # by torchrun
Command = Callable[..., None]


def several() -> bool:
    """Whether this process is one of several that torchrun has started."""
    return int(os.environ.get("WORLD_SIZE") or 1) > 1


def is_first() -> bool:
    """Whether this process writes and prints."""
    return not several() or os.environ.get("RANK") == "0"


def name() -> str:
    """What messages of one of several ranks start with."""
    return f"rank {os.environ.get('RANK')}: " if several() else ""


def alone(command: Command) -> Command:
    """A command that works in one process, and says so under torchrun."""

    @wraps(command)
    def run(**options: Any) -> None:
        if several():
            raise BiasCompensationError(
                f"`bc-plugin {command.__name__}` works in one process; start it without torchrun "
                "(WORLD_SIZE is set in the environment)."
            )
        command(**options)

    return run


def shared(command: Command) -> Command:
    """A command that the processes of torchrun do together, each with its share of the data."""

    @wraps(command)
    def run(**options: Any) -> None:
        with _joined(options["device_map"]) if several() else ExitStack():
            command(**options)

    return run


@contextmanager
def by_first(making: AbstractContextManager[Path]) -> Iterator[Path | None]:
    """What the first rank makes; the others are given None, and go on once it is in place."""
    with ExitStack() as stack:
        yield stack.enter_context(making) if is_first() else None
    if several():
        from ..ranks import wait_for_all

        wait_for_all()


@contextmanager
def _joined(device_map: str) -> Iterator[None]:
    missing = [key for key in SET if key not in os.environ]
    if missing:
        raise BiasCompensationError(
            f"WORLD_SIZE is set in the environment, and {', '.join(missing)} not: start several "
            "processes with torchrun, or take WORLD_SIZE out."
        )
    if not is_first():
        os.environ["TQDM_DISABLE"] = "1"  # which tqdm reads when it is imported, by torch
    backend = _backend(device_map)
    import torch.distributed as dist
    from torch.multiprocessing import _prctl_pr_set_pdeathsig

    from ..ranks import reached, together

    _prctl_pr_set_pdeathsig(SIGTERM)  # nobody else would end this process if torchrun were killed
    with reached():
        dist.init_process_group(backend, timeout=PATIENCE)
    with together(), ExitStack() as stack:
        if not is_first():
            nothing = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(redirect_stdout(nothing))
        yield
    dist.destroy_process_group()


def _backend(device_map: str) -> str:
    """What ranks exchange tensors with. From here on each sees its share of the machine's GPUs.

    Raises:
        BiasCompensationError: there are too few, or all ranks would use one.
    """
    if device_map == "cpu":
        return "gloo"
    if device_map not in ("cuda", *SPREAD):
        raise BiasCompensationError(
            f"--device-map {device_map}: of several ranks each uses its share of the GPUs, or the "
            "CPU; expected auto, cuda or cpu."
        )
    import torch

    count = torch.cuda.device_count()  # which leaves it open what is visible later
    if not count:
        return "gloo"
    rank, ranks = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if count < ranks:
        raise BiasCompensationError(
            f"{ranks} ranks share {count} GPUs here; start at most one for each, or use "
            "--device-map cpu."
        )
    names = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    own = names.split(",")[rank * count // ranks : (rank + 1) * count // ranks]
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(own)
    return "nccl"
