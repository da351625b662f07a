"""llama.cpp, from its packages (``make setup-llama-cpp`` fetches them; needs node)."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rig.folders import REPOSITORY

LLAMA_CPP = Path(os.environ.get("BC_PLUGIN_LLAMA_CPP", REPOSITORY / ".llama-cpp")).absolute()
CONVERTER = LLAMA_CPP / "convert_hf_to_gguf.py"
PACKAGES = LLAMA_CPP / "python"  # llama-cpp-python on those binaries, and what it needs
QUANTIZER = Path(__file__).with_name("llama_quantizer.py").absolute()
SERVER = Path(__file__).with_name("llama_server.py").absolute()
SPEED = Path(__file__).with_name("llama_speed.py").absolute()
SERVER_PACKAGES = LLAMA_CPP / "server"  # what llama-cpp-python's HTTP server needs
WORKER = Path(__file__).with_name("llama_worker.mjs").absolute()  # it runs in another folder


def log_probabilities(model: Path, ids: list[list[int]], folder: Path) -> list[list[float]]:
    """What llama.cpp gives the tokens of each prompt, after their first.

    Args:
        model: The exported checkpoint, which is converted first.
        ids: Token ids, a list per prompt.
        folder: Where files are exchanged.
    """
    convert(model, folder / "model.gguf")
    return log_probabilities_of_file(folder / "model.gguf", ids, folder)


def log_probabilities_of_file(model: Path, ids: list[list[int]], folder: Path) -> list[list[float]]:
    """The same of a GGUF file, by node-llama-cpp."""
    (folder / "ids.json").write_text(json.dumps(ids))
    files = [model.absolute(), folder / "ids.json", folder / "found.json"]
    subprocess.run(["node", WORKER, *files], check=True, cwd=LLAMA_CPP)
    return json.loads((folder / "found.json").read_text())


def convert(model: Path, out: Path, kind: str = "f32") -> None:
    """Make a GGUF file of a checkpoint, with llama.cpp's converter."""
    command = [sys.executable, CONVERTER, model, "--outtype", kind, "--outfile", out]
    subprocess.run(command, check=True, env=_environment())


def quantize(source: Path, out: Path, kind: str, imatrix: Path | None = None) -> None:
    """Quantize a float GGUF file with llama.cpp's quantizer.

    Args:
        kind: As llama-quantize calls it, such as Q2_K or Q4_K_M.
        imatrix: Of each weight's inputs, see ``llama_quantizer.py``.
    """
    files = [source.absolute(), out.absolute()]
    more = [] if imatrix is None else [imatrix.absolute()]
    _run_worker(QUANTIZER, *files, kind, "1", *more)


def speeds(
    models: list[Path], folder: Path, turns: int, prompt: int, generated: int
) -> list[list[list[float]]]:
    """Tokens per second of files in turns, see ``llama_speed.py``; plain biases only."""
    out = folder.absolute() / "speeds.json"
    numbers = [os.environ.get("OMP_NUM_THREADS", "1"), turns, prompt, generated]
    _run_worker(SPEED, out, *map(str, numbers), *(model.absolute() for model in models))
    return json.loads(out.read_text())


@contextmanager
def served(model: Path) -> Iterator[Callable[[str, dict], Any]]:
    """llama-cpp-python's HTTP server with a file; what is given asks it: a path, and JSON."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    packages = os.pathsep.join(map(str, (PACKAGES, SERVER_PACKAGES)))
    process = subprocess.Popen(
        [sys.executable, SERVER, model.absolute(), str(port)],
        env={**os.environ, "PYTHONPATH": packages},
        cwd=PACKAGES / "llama_cpp" / "lib",
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def ask(path: str, body: dict | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    try:
        for _ in range(120):
            try:
                ask("/v1/models")
                break
            except urllib.error.URLError:
                assert process.poll() is None, f"the server has ended with {process.poll()}"
                time.sleep(0.5)
        yield ask
    finally:
        process.terminate()
        process.wait()


def _run_worker(*command: str | Path) -> None:
    # llama.cpp looks for its backends in the folder that it is run in.
    subprocess.run(
        [sys.executable, *command],
        check=True,
        env=_environment(),
        cwd=PACKAGES / "llama_cpp" / "lib",
        capture_output=True,
    )


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(PACKAGES)}
