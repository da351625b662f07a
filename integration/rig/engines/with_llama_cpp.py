"""llama.cpp, from its packages (``make setup-llama-cpp`` fetches them; needs node)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from rig.folders import REPOSITORY

LLAMA_CPP = Path(os.environ.get("BC_PLUGIN_LLAMA_CPP", REPOSITORY / ".llama-cpp")).absolute()
CONVERTER = LLAMA_CPP / "convert_hf_to_gguf.py"
PACKAGES = LLAMA_CPP / "python"  # llama-cpp-python on those binaries, and what it needs
QUANTIZER = Path(__file__).with_name("llama_quantizer.py").absolute()
SPEED = Path(__file__).with_name("llama_speed.py").absolute()
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
