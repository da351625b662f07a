"""vLLM, in its own environment (``make setup-vllm`` builds it)."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from rig.folders import REPOSITORY

VLLM = Path(os.environ.get("BC_PLUGIN_VLLM_PYTHON", REPOSITORY / ".venv-vllm" / "bin" / "python"))
WORKER = Path(__file__).with_name("vllm_worker.py")
KERNELS = Path(__file__).with_name("kernels")  # what vLLM lacks on some CPUs


def run_vllm(
    model: Path,
    prompts: list[list[int]],
    folder: Path,
    *,
    continued: int = 0,
    timed: int = 0,
    classes: bool = False,
    environment: dict[str, str] | None = None,
    **engine: Any,
) -> dict[str, Any]:
    """What vLLM gives the tokens of each prompt, after their first, and whatever else is asked.

    Args:
        model: The checkpoint.
        prompts: Token ids, a list per prompt.
        folder: Where files are exchanged, and where compiled code is kept.
        continued, timed, classes: See the worker.
        environment: Variables beside this process's own.
        engine: Arguments of vLLM's ``LLM``.

    Raises:
        VLLMError: it stopped with an error.
    """
    asked = {"prompts": prompts, "continued": continued, "timed": timed, "classes": classes}
    asked["engine"] = engine
    (folder / "asked.json").write_text(json.dumps(asked))
    command = [VLLM, WORKER, model, folder / "asked.json", folder / "found.json"]
    workers = engine.get("tensor_parallel_size", 1)
    process = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**surroundings(folder, workers), **(environment or {})},
    )
    (folder / "vllm.log").write_text(process.stdout)
    if process.returncode:
        raise VLLMError(process.stdout)
    return json.loads((folder / "found.json").read_text())


class VLLMError(RuntimeError):
    """vLLM stopped; the message is its whole log."""


def surroundings(folder: Path, workers: int = 1) -> dict[str, str]:
    """The environment that vLLM runs in."""
    cores = {} if workers == 1 else {"VLLM_CPU_OMP_THREADS_BIND": "|".join("01"[:workers])}
    own = {key: value for key, value in os.environ.items() if key != "TORCHDYNAMO_DISABLE"}
    files = {"VLLM_CACHE_ROOT": str(folder / "vllm-cache"), "PYTHONPATH": str(KERNELS)}
    files["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # to send a function to the model
    return {**own, **files, **cores}


def log_probabilities(
    model: Path, prompts: list[list[int]], folder: Path, **options: Any
) -> list[list[float]]:
    """``run_vllm``, the log-probabilities of the prompts alone."""
    return run_vllm(model, prompts, folder, **options)["log_probabilities"]
