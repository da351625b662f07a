"""kill -9 of one process or of all, at moments all over a run, and what is there afterwards."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import torch
from rig.subjects.large import SHAPES
from scale_parts import checkpoints, command, compensating, environment

MOMENTS, SECONDS = 10, 600
BAR = b"%|"
NAMES = ("compensate", "refine")
OUTCOMES = (
    "nothing was there, right when run again",
    "it was whole by then",
    "partial or wrong",
    "wrong or failed when run again",
    "left something over",
    "processes went on",
)
CLEAN, WHOLE, PARTIAL, FAILED, LEFT, ALIVE = OUTCOMES


def kills(ranks: int, moments: int) -> dict[str, Any]:
    """Kill a pass and a refinement of a tiny model ``moments`` times each, in two ways."""
    counts = []
    with checkpoints(SHAPES["tiny"], SHAPES["tiny"].layers, torch.float32) as folder:
        for name in NAMES:
            arguments = _arguments(name, folder)
            seconds, expected = _whole(arguments, ranks)
            for whole in (False, True):
                found = Counter(
                    _killed(arguments, ranks, seconds * (i + 0.5) / moments, whole, expected)
                    for i in range(moments)
                )
                killed = "all" if whole else f"one of {ranks}"
                counts.append({"killed": killed, "command": name, "outcomes": found})
            if name == "compensate":
                _run(arguments, ranks)  # what refinement starts from
                shutil.move(arguments[3], folder / "compensated")
    return {"ranks": ranks, "counts": counts}


def _arguments(name: str, folder: Path) -> list[str]:
    """A command whose OUT is the only thing in a folder of its own."""
    room = folder / f"room-{name}"
    room.mkdir()
    found = compensating(folder, room / "out", 4096, "float32")
    if name == "refine":
        found[0], found[1] = "refine", str(folder / "compensated")
        found += ["--steps", "32"]
    return found


def _contents(out: Path) -> dict[str, bytes]:
    """The files but for the card, which says how long it took."""
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name != "README.md"}


def _whole(arguments: list[str], ranks: int) -> tuple[float, dict[str, bytes]]:
    """How long a run takes from its first bar on, if nobody kills it, and what it writes."""
    process = _started(arguments, ranks)
    start = time.monotonic()
    if process.wait():
        said = _log(arguments).read_text(errors="replace")[-2000:]
        raise RuntimeError(f"{' '.join(arguments)} failed: {said}")
    seconds = time.monotonic() - start
    expected = _contents(Path(arguments[3]))
    _clear(arguments)
    return seconds, expected


def _log(arguments: list[str]) -> Path:
    return Path(arguments[3]).parent.with_suffix(".log")


def _started(arguments: list[str], ranks: int) -> subprocess.Popen:
    """A run that has imported everything and shows a progress bar, or has ended by then."""
    log = _log(arguments)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command(arguments, ranks), env=environment(1), stdout=output, stderr=output
        )
    while process.poll() is None and BAR not in log.read_bytes():
        time.sleep(0.01)
    return process


def _run(arguments: list[str], ranks: int) -> int:
    return _started(arguments, ranks).wait()


def _clear(arguments: list[str]) -> None:
    room = Path(arguments[3]).parent
    shutil.rmtree(room)
    room.mkdir()


def _killed(
    arguments: list[str], ranks: int, after: float, whole: bool, expected: dict[str, bytes]
) -> str:
    """What became of a run that was killed so many seconds after its first progress bar."""
    process = _started(arguments, ranks)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(after)
    if process.poll() is not None:  # faster than the run that was timed: another moment
        _clear(arguments)
        return _killed(arguments, ranks, 0.7 * after, whole, expected)
    family = _family(process.pid)
    members = [each for each in family if each.pid != process.pid] or family
    _kill(family if whole else members[-1:])
    try:
        process.wait(SECONDS)
        _, left = psutil.wait_procs(family, timeout=60)
    except subprocess.TimeoutExpired:
        left = family
    if left:
        _kill(left)
        process.wait()
    try:
        return ALIVE if left else _outcome(arguments, ranks, expected)
    finally:
        _clear(arguments)


def _outcome(arguments: list[str], ranks: int, expected: dict[str, bytes]) -> str:
    out = Path(arguments[3])
    if out.exists():
        return WHOLE if _contents(out) == expected else PARTIAL
    if _run(arguments, ranks) or _contents(out) != expected:
        return FAILED
    return CLEAN if [path.name for path in out.parent.iterdir()] == [out.name] else LEFT


def _family(number: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(number)
        return [process, *process.children()]
    except psutil.NoSuchProcess:
        return []


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            os.kill(process.pid, signal.SIGKILL)
