"""SmolLM2-135M as llama.cpp quantizes it: as it was, compensated and refined, in llama.cpp.

    make benchmark-gguf

Each type is made without and with an importance matrix. Its widths, 576 and 1536, are not all
multiples of the 256 values in a block of the K-quants; what llama.cpp took instead stands in the
first table. Perplexity and KL are those of the same held-out tokens in llama.cpp, which has the
float model, too.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from rich.console import Console
from rich.table import Table
from rig.engines import with_llama_cpp
from rig.folders import CACHE
from rig.quantizers.imatrix import write_imatrix
from rig.subjects import real
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import bc_plugin
from bc_plugin import RefinementConfig
from bc_plugin.gguf.file import GGUFFile
from bc_plugin.gguf.load import load_model
from bc_plugin.gguf.places import places_in
from bc_plugin.gguf.verify import llama_cpp_logits, verify
from bc_plugin.gguf.write import write_compensated

FOLDER = CACHE / "gguf"
HELD_OUT = 8  # of the sequences of the refinement
SETTINGS = {"positions": 0, "dtype": "float32"}
# Where tables are kept, so that a run that is stopped goes on.
RESULTS = FOLDER / "results.json"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="+", default=["Q4_0", "Q2_K"])
    parser.add_argument("--length", type=int, default=512, help="tokens in a sequence")
    parser.add_argument("--calibrated", type=int, default=32, help="sequences of the closed form")
    parser.add_argument("--trained", type=int, default=256, help="sequences of the refinement")
    parser.add_argument("--evaluated", type=int, default=12, help="held-out sequences")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--turns", type=int, default=15, help="of the speeds")
    return parser.parse_args()


def main() -> None:
    options = _arguments()
    sys.path.append(str(with_llama_cpp.PACKAGES))  # so that the plugin finds llama-cpp-python
    FOLDER.mkdir(parents=True, exist_ok=True)
    source = real.smollm2()
    tokenizer = AutoTokenizer.from_pretrained(source)
    data = real.calibration_windows(tokenizer, options.length, options.trained)
    windows = real.held_out_windows(tokenizer, options.length, options.evaluated)
    held_out = torch.cat([window["input_ids"] for window in windows])
    whole = FOLDER / "f32.gguf"
    if not whole.exists():
        with_llama_cpp.convert(source, whole)
    float_model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    few = data[: options.calibrated]
    imatrix = FOLDER / f"imatrix-{options.calibrated}-{options.length}.npz"
    if not imatrix.exists():
        write_imatrix(float_model, few, imatrix)
    share = HELD_OUT / options.trained
    config = RefinementConfig(steps=options.steps, train="vectors", held_out=share)
    # Once for all files; what is there of the same model and data is kept.
    logits = bc_plugin.record_float_logits(float_model, data, config, folder=FOLDER / "logits")
    refinement = logits, data, config
    predicted = _log_probabilities(whole, held_out)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    settings = {k: v for k, v in vars(options).items() if k not in ("kinds", "turns")}
    shown = []
    for kind in options.kinds:
        for matrix in (None, imatrix):
            name = f"{kind}{', imatrix' if matrix else ''}"
            key = f"{name}, {settings}"
            path = FOLDER / f"{kind}{'-imatrix' if matrix else ''}.gguf"
            if key not in results:
                with_llama_cpp.quantize(whole, path, kind, matrix)
                found = _measure(path, float_model, few, refinement, held_out, predicted, options)
                results[key] = {"name": name, **found}
                RESULTS.write_text(json.dumps(results))
            if len(results[key].get("speeds", [[]])[0]) < options.turns:
                results[key]["speeds"] = _speeds(path, options)
                RESULTS.write_text(json.dumps(results))
            shown.append(results[key])
    _print(shown, _perplexity(predicted, held_out))


def _measure(path, float_model, few, refinement, held_out, predicted, options) -> dict:
    """Everything of one file."""
    file = GGUFFile(path)
    places = places_in(file)
    model = load_model(file, config=float_model.config)
    only = places.__contains__
    compensation = bc_plugin.compensate(model, float_model, few, SETTINGS, only=only)
    compensated = _compensated(path)
    kept = write_compensated(file, compensated, compensation)
    verify(file, compensated, model, kept)
    kept.attach_unchecked(model)
    refined = bc_plugin.refine(model, *refinement)
    refined.detach(model)
    trained = path.with_name(f"{path.stem}-refined.gguf")
    verify(file, trained, model, write_compensated(file, trained, refined))
    rows = {"as it was": path, "compensated": compensated, "refined": trained}
    return {
        "types": file.types(),
        "bytes": {name: each.stat().st_size for name, each in rows.items()},
        "rows": {name: _against(each, held_out, predicted) for name, each in rows.items()},
    }


def _speeds(path: Path, options: argparse.Namespace) -> list:
    """Tokens per second of the file as it was and compensated, in turns."""
    files = [path, _compensated(path)]
    lengths = options.length // 2, options.length // 8
    return with_llama_cpp.speeds(files, FOLDER, options.turns, *lengths)


def _compensated(path: Path) -> Path:
    return path.with_name(f"{path.stem}-compensated.gguf")


def _against(path: Path, held_out: Tensor, predicted: Tensor) -> dict[str, float]:
    """Perplexity in llama.cpp, and KL from what the float file predicts there."""
    found = _log_probabilities(path, held_out)
    pairs = zip(predicted, found, strict=True)
    divergence = sum((p.exp() * (p - q)).double().sum().item() for p, q in pairs)
    return {"perplexity": _perplexity(found, held_out), "kl": divergence / found[..., 0].numel()}


def _perplexity(found: Tensor, held_out: Tensor) -> float:
    return math.exp(-found.gather(-1, held_out[:, 1:, None]).double().mean().item())


def _log_probabilities(path: Path, held_out: Tensor) -> Tensor:
    return llama_cpp_logits(path, held_out)[:, :-1].log_softmax(-1)


def _print(found: list[dict], perplexity: float) -> None:
    console = Console()
    types = Table("file", "tensors", "MB", title="What each tensor became")
    quality = Table("file", "", "perplexity", "KL", "KL, of as it was", title="In llama.cpp")
    speed = Table("file", "prompt", "generation", title="Tokens per second, compensated over not")
    quality.add_row("F32", "", f"{perplexity:.2f}")
    for each in found:
        tensors = ", ".join(f"{count} {name}" for name, count in each["types"].items())
        types.add_row(each["name"], tensors, f"{each['bytes']['as it was'] / 1e6:.1f}")
        before = each["rows"]["as it was"]["kl"]
        for row, values in each["rows"].items():
            share = f"{values['kl'] / before - 1:+.0%}" if row != "as it was" else ""
            numbers = f"{values['perplexity']:.2f}", f"{values['kl']:.4f}", share
            quality.add_row(each["name"], row, *numbers)
        plain, compensated = each["speeds"]
        ratios = [
            sorted(theirs[i] / ours[i] for ours, theirs in zip(plain, compensated, strict=True))
            for i in range(2)
        ]
        speed.add_row(each["name"], *(f"{ratio[len(ratio) // 2]:.3f}" for ratio in ratios))
    for table in (types, quality, speed):
        console.print(table)


if __name__ == "__main__":
    main()
