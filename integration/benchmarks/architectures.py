"""Every causal language model of transformers, tiny and random: what compensation does with it.

    make benchmark-architectures

prints one table. Each model is quantized crudely and compensated. Then its vectors must take the
whole mean shift out of every site, fed what the float model feeds it; decoding token by token must
give what one forward pass gives; and a left-padded sequence what the sequence alone does. What was
found is kept for each architecture, so a stopped run goes on; ``--again`` starts anew.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import os
import re
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # many small models, each in a process of its own

import torch
import transformers
from helpers.language import crudely_quantized, token_batches
from rig import architecture_checks as checks
from rig.subjects import tiny_architectures

import bc_plugin
from bc_plugin import BiasCompensationError

FOLDER = Path(__file__).parents[2] / ".cache" / "architectures"
POSITIONS = (0, 1)
SECONDS = 120
WORKS, REFUSED, WRONG, NOT_RUN = "works", "refused", "wrong", "not run"
# Where a model has several lists of blocks, those of the language model are named.
TEXT = ("language_model", "text_model", "decoder", "model.layers")


def _named(error: BiasCompensationError) -> str:
    """Of the lists of blocks that an error tells of, the one to name."""
    paths = re.findall(r"'([^']+)'", str(error).split("Name one")[0])
    return next((path for part in TEXT for path in paths if part in path), paths[-1])


def _compensation(quantized: Any, model: Any, batches: list, positions: int) -> Any:
    config = {"positions": positions, "held_out": 0, "max_tokens": None, "batch_tokens": 1}
    config["dtype"] = "float32"
    try:
        return bc_plugin.compensate(quantized, model, batches, config)
    except BiasCompensationError as error:
        if "Name one" not in str(error):
            raise
        config["blocks"] = _named(error)
        return bc_plugin.compensate(quantized, model, batches, config)


def _with_positions(model: Any, quantized: Any, positions: int) -> dict[str, Any]:
    batches = token_batches(3)
    try:
        compensation = _compensation(quantized, model, batches, positions)
    except BiasCompensationError as error:
        return {"outcome": REFUSED, "why": str(error)}
    found = {"sites": len(compensation.vectors), "blocks": compensation.blocks}
    compensated = copy.deepcopy(quantized)
    compensation.attach_unchecked(compensated)
    if positions == 0:
        left = checks.shift_left(model, compensated, compensation, batches)
        found["vectors"] = "exact" if left < checks.CLOSE else f"leave {left:.2g} of the shift"
    else:  # so different that a token given another's row shows
        compensation.detach(compensated)
        for vectors in compensation.vectors.values():
            vectors[:-1] += 0.5 * torch.randn(vectors[:-1].shape)
        compensation.attach_unchecked(compensated)
    ids = token_batches(1, length=checks.PROMPT, seed=1)[0]["input_ids"]
    for name, check in {
        "decoding": checks.decoding_differs,
        "padding": checks.padding_differs,
    }.items():
        found[name] = checks.compared(check, quantized, compensated, ids)
    right = found.get("vectors", "exact") == "exact" and not any(
        found[name].startswith("differs") for name in ("decoding", "padding")
    )
    return {"outcome": WORKS if right else WRONG, **found}


def _examined(architecture: str) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    try:
        model = tiny_architectures.tiny_model(architecture)
        with torch.no_grad():
            model(**token_batches(1)[0])
    except Exception as error:
        return {NOT_RUN: f"{type(error).__name__}: {error}"[:200]}
    quantized = crudely_quantized(model)
    found = {}
    for positions in POSITIONS:
        try:
            found[str(positions)] = _with_positions(model, quantized, positions)
        except Exception as error:
            why = f"{type(error).__name__}: {error}"[:200]
            found[str(positions)] = {"outcome": WRONG, "why": why}
    return found


def _examine(architecture: str, path: Path) -> None:
    found = _examined(architecture)
    path.write_text(json.dumps(found, indent=1), encoding="utf-8")


def examined(architecture: str) -> dict[str, Any]:
    """What was found out of one architecture, in a process of its own or earlier."""
    path = FOLDER / f"{architecture}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        worker = multiprocessing.get_context("fork").Process(
            target=_examine, args=(architecture, path)
        )
        worker.start()
        worker.join(SECONDS)
        if worker.is_alive():
            worker.kill()
            worker.join()
        if not path.exists():
            path.write_text(json.dumps({NOT_RUN: f"ended with {worker.exitcode}"}))
    return json.loads(path.read_text(encoding="utf-8"))


def _reason(why: str) -> str:
    """Of an error, what is no name or shape of this one model, so that like cases meet."""
    why = re.sub(r"'?[\w.]*[a-z]\.\d+[\w.]*'?", "a site", why.split("\n")[0])
    return why.split("; ")[0].split(". ")[0].rstrip(".:")


def outcome(found: dict[str, Any]) -> str:
    """In words, for the table."""
    if NOT_RUN in found:
        return f"not run: {_reason(found[NOT_RUN])}"
    both = [found[str(positions)] for positions in POSITIONS]
    if any(one["outcome"] == WRONG for one in both):
        return WRONG
    if both[0]["outcome"] == REFUSED:
        return f"refused: {_reason(both[0]['why'])}"
    if both[1]["outcome"] == REFUSED:
        return f"positions=0 alone: {_reason(both[1]['why'])}"
    checked = all(found["1"][check] == "same" for check in ("decoding", "padding"))
    return WORKS if checked else f"{WORKS}; cannot decode or be padded alike by itself"


def table(all_found: dict[str, dict[str, Any]]) -> str:
    """Markdown: what came of how many, and which."""
    types: dict[str, list[str]] = {}
    for architecture, found in all_found.items():
        types.setdefault(outcome(found), []).append(f"`{architecture}`")
    rows = sorted(types.items(), key=lambda row: (-len(row[1]), row[0]))
    lines = ["| | types | |", "|---|---|---|"]
    lines += [f"| {what} | {len(names)} | {', '.join(names)} |" for what, names in rows]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="*", default=tiny_architectures.ARCHITECTURES)
    parser.add_argument("--again", action="store_true", help="forget what was found before")
    options = parser.parse_args()
    if options.again:
        for architecture in options.only:
            (FOLDER / f"{architecture}.json").unlink(missing_ok=True)
    all_found = {}
    for architecture in options.only:
        all_found[architecture] = examined(architecture)
        print(architecture, json.dumps(all_found[architecture]), flush=True)
    print(table(all_found))


if __name__ == "__main__":
    main()
