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
WORKER = Path(__file__).with_name("llama_worker.mjs").absolute()  # it runs in another folder


def log_probabilities(model: Path, ids: list[list[int]], folder: Path) -> list[list[float]]:
    """What llama.cpp gives the tokens of each prompt, after their first.

    Args:
        model: The exported checkpoint, which is converted first.
        ids: Token ids, a list per prompt.
        folder: Where files are exchanged.
    """
    (folder / "ids.json").write_text(json.dumps(ids))
    convert = [sys.executable, CONVERTER, model, "--outtype", "f32"]
    packages = {**os.environ, "PYTHONPATH": str(LLAMA_CPP / "python")}
    subprocess.run([*convert, "--outfile", folder / "model.gguf"], check=True, env=packages)
    files = [folder / name for name in ("model.gguf", "ids.json", "found.json")]
    subprocess.run(["node", WORKER, *files], check=True, cwd=LLAMA_CPP)
    return json.loads((folder / "found.json").read_text())
