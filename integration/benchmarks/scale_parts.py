"""What the benchmark of scale measures: commands on checkpoints that exist for as long as that."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from rig.folders import CACHE
from rig.memory import measured
from rig.subjects.large import GROUP_SIZE, SHAPES, Shape, bytes_of, write_pair

import bc_plugin
from bc_plugin import Compensation

FOLDER = CACHE / "scale"
LENGTH = 512
BATCH = LENGTH  # tokens in a forward pass, so that what a block makes of them is little


@contextmanager
def checkpoints(shape: Shape, layers: int, dtype: torch.dtype) -> Iterator[Path]:
    """A folder with ``float``, ``quantized`` and ``text.txt``, deleted afterwards.

    Raises:
        SystemExit: the disk is too small for them.
    """
    folder = FOLDER / "checkpoints"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    needed, free = bytes_of(shape, layers), shutil.disk_usage(folder).free
    if needed > free:
        raise SystemExit(
            f"{layers} blocks take {needed / 1e9:.0f} GB on the disk of {folder}, which has "
            f"{free / 1e9:.0f} GB left; use fewer --layers, or set BC_PLUGIN_CACHE."
        )
    try:
        write_pair(folder, shape, layers, dtype)
        yield folder
    finally:
        shutil.rmtree(folder)


def compensating(folder: Path, out: Path, tokens: int, dtype: str) -> list[str]:
    """The arguments of a pass over so many tokens."""
    data = ("--dataset", folder / "text.txt", "--samples", tokens // LENGTH, "--length", LENGTH)
    models = (folder / "quantized", folder / "float", out)
    options = ("--dtype", dtype, "--device-map", "cpu", "--batch-tokens", BATCH)
    return [str(word) for word in ("compensate", *models, *data, *options)]


def measure_pass(
    name: str, layers: int, tokens: int, dtype: str, vocabulary: int | None
) -> dict[str, Any]:
    """The pass and export of a shape, beside what the plan says of the pass."""
    shape = SHAPES[name]
    if vocabulary is not None:
        shape = dataclasses.replace(shape, vocabulary=vocabulary)
    with checkpoints(shape, layers, torch.bfloat16) as folder:
        plan = bc_plugin.plan(
            folder / "float",
            group_size=GROUP_SIZE,
            samples=tokens // LENGTH,
            length=LENGTH,
            dtype=dtype,
            config={"batch_tokens": BATCH},
            flops_per_second=1e12,
        )
        out, log = folder / "out", FOLDER / f"{name}-{layers}-{tokens}"
        compensated = measured(
            compensating(folder, out, tokens, dtype), log.with_suffix(".compensate.log")
        )
        arguments = ["export", out, folder / "plain", "--for", "vllm", "--no-verify"]
        exported = measured(arguments, log.with_suffix(".export.log"))
        assert Compensation.load(out).nbytes == plan.vectors
    return {
        "shape": name,
        "layers": layers,
        "tokens": tokens,
        "plan": plan.stages["pass"].memory,
        "compensate": asdict(compensated),
        "export": asdict(exported),
    }


def command(arguments: list[str], ranks: int) -> list[str]:
    """``bc-plugin`` in so many processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [sys.executable, *(launcher if ranks > 1 else ()), "-m", "bc_plugin", *arguments]


def environment(threads: int) -> dict[str, str]:
    """That of a process with so many threads."""
    return {**os.environ, "OMP_NUM_THREADS": str(threads)}


def measure_ranks(name: str) -> dict[str, Any]:
    """Two processes of one thread, and one of two: their vectors and seconds."""
    shape = SHAPES[name]
    seconds, vectors = {}, []
    with checkpoints(shape, shape.layers, torch.float32) as folder:
        for ranks in (1, 2):
            out = folder / f"out-{ranks}"
            arguments = compensating(folder, out, 8 * LENGTH, "float32")
            start = time.perf_counter()
            subprocess.run(
                command(arguments, ranks),
                check=True,
                env=environment(2 // ranks),
                stdout=subprocess.DEVNULL,
            )
            seconds[ranks] = time.perf_counter() - start
            vectors.append(Compensation.load(out).vectors)
    one, two = vectors
    assert one.keys() == two.keys()
    return {
        "layers": shape.layers,
        "seconds": seconds,
        "difference": max((one[key] - two[key]).abs().max().item() for key in one),
        "largest": max(value.abs().max().item() for value in one.values()),
    }
