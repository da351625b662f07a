"""Commands of ``bc-plugin`` in processes of their own, whose memory is watched."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

EVERY = 0.05  # seconds
# glibc would keep what tensors had held, in a heap full of holes: as much again and more.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**17)}
# What every command imports, so that memory is counted from there on.
PROGRAM = """
import sys, psutil, torch, transformers, accelerate
import transformers.models.llama.modeling_llama
from transformers import AutoModelForCausalLM, AutoTokenizer
{more}
import bc_plugin.compensate, bc_plugin.refine, bc_plugin.export
from bc_plugin.cli import main
torch.randn(64, 64) @ torch.randn(64, 64)
found = psutil.Process().memory_info()
open({base!r}, "w").write(f"{{found.rss}} {{found.shared}}")
main()
"""
BLOCKS = re.compile(r"Compensating blocks: 100%\D+(\d+)/\d+ \[(?:(\d+):)?(\d+):(\d+)<")


@dataclass(frozen=True)
class Measured:
    """What a command took.

    Attributes:
        resident: Bytes at the peak beyond what imports had taken, of the largest process.
        anonymous: The same without pages that are mapped from files, which can be dropped.
        largest: What the system says was most (``ru_maxrss``), imports and mapped files included.
        seconds: From the imports on.
        per_block: Seconds for each block, by the pass's progress bar; None where there is none.
    """

    resident: int
    anonymous: int
    largest: int
    seconds: float
    per_block: float | None


def measured(arguments: list[Any], log: Path, more: str = "") -> Measured:
    """Run a command and watch it.

    Args:
        log: What it prints goes there.
        more: Imports to be made before memory counts.

    Raises:
        RuntimeError: it failed.
    """
    base = log.with_suffix(".base")
    base.unlink(missing_ok=True)
    program = PROGRAM.format(base=str(base), more=more)
    command = [sys.executable, "-c", program, *map(str, arguments)]
    peaks: dict[int, list[int]] = {}
    start = None
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env={**os.environ, **GIVE_BACK}
        )
    while True:
        number, status, usage = os.wait4(process.pid, os.WNOHANG)
        if number:
            break
        if start is None and base.is_file() and base.read_text():
            start = time.monotonic()
        if start is not None:
            _look(process.pid, peaks)
        time.sleep(EVERY)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode or start is None:
        raise RuntimeError(f"{' '.join(map(str, arguments))} failed: {log.read_text()[-2000:]}")
    resident, shared = map(int, base.read_text().split())
    anonymous = resident - shared
    return Measured(
        max(peak[0] for peak in peaks.values()) - resident,
        max(peak[1] for peak in peaks.values()) - anonymous,
        usage.ru_maxrss * 1024,
        time.monotonic() - start,
        _per_block(log),
    )


def _look(number: int, peaks: dict[int, list[int]]) -> None:
    """Note what a process and those that it started hold now."""
    try:
        process = psutil.Process(number)
        for each in (process, *process.children(recursive=True)):
            found = each.memory_info()
            peak = peaks.setdefault(each.pid, [0, 0])
            peak[0] = max(peak[0], found.rss)
            peak[1] = max(peak[1], found.rss - found.shared)
    except psutil.NoSuchProcess:
        return


def _per_block(log: Path) -> float | None:
    found = BLOCKS.findall(log.read_text(errors="replace"))
    if not found:
        return None
    count, hours, minutes, seconds = (int(part or 0) for part in found[-1])
    return (3600 * hours + 60 * minutes + seconds) / count
