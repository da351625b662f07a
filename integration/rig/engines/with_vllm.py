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


def log_probabilities(
    model: Path, ids: list[list[int]], folder: Path, **options: int
) -> dict[str, Any]:
    """What vLLM gives the tokens of each prompt, after their first; and what the worker adds.

    Args:
        model: The exported checkpoint.
        ids: Token ids, a list per prompt.
        folder: Where files are exchanged.
        options: The worker's own.
    """
    (folder / "ids.json").write_text(json.dumps(ids))
    command = [VLLM, WORKER, model, folder / "ids.json", folder / "found.json"]
    for name, value in options.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    workers = options.get("tensor_parallel_size", 1)
    cores = {} if workers == 1 else {"VLLM_CPU_OMP_THREADS_BIND": "|".join("01"[:workers])}
    subprocess.run(command, check=True, env={**os.environ, **cores})
    return json.loads((folder / "found.json").read_text())
