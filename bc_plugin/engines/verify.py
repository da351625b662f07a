"""What was exported, loaded, in a fresh process where it is plain, and compared with the plugin."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import BiasCompensationError
from ..names import FILE, FILES_DIGEST, KEY
from ..vectors.checkpoint import checkpoint_files, read_metadata, require_bound
from ..vectors.compensation import Compensation
from ..vectors.sealed import unseal
from ..vectors.settings import read_settings
from .plan import Plan

TOKENS = 48
# A fresh process, in which nothing of this package is imported.
LOADED_ALONE = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], device_map=sys.argv[2]).eval()
with torch.no_grad():
    ids = torch.load(sys.argv[3]).to(next(model.parameters()).device)
    torch.save(model(input_ids=ids).logits.float().cpu(), sys.argv[4])
"""


@contextmanager
def _unsealed(source: Path) -> Iterator[Path]:
    """The same checkpoint for loaders without the plugin, which need not be enabled here."""
    with tempfile.TemporaryDirectory() as folder:
        for file in filter(Path.is_file, source.iterdir()):
            Path(folder, file.name).symlink_to(file.absolute())
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        if "quantization_config" in config:
            config["quantization_config"] = unseal(config["quantization_config"])
            Path(folder, "config.json").unlink()
            Path(folder, "config.json").write_text(json.dumps(config), encoding="utf-8")
        yield Path(folder)


@torch.no_grad()
def verify_plain(
    source: Path, exported: Path, whole: Compensation, plan: Plan, device_map: str
) -> None:
    """Compare a plain checkpoint with the plugin, in logits of arbitrary tokens."""
    model = _plain_model(source, device_map)
    whole.check(model)
    carried = whole.only(plan.carried)
    ids = _tokens(model)
    plain, expected = _logits(model, ids), _logits(model, ids, carried)
    dtype = next(model.parameters()).dtype
    del model
    with tempfile.TemporaryDirectory() as folder:
        files = [str(Path(folder) / name) for name in ("ids.pt", "logits.pt")]
        torch.save(ids.cpu(), files[0])
        command = [sys.executable, "-c", LOADED_ALONE, str(exported), device_map, *files]
        process = subprocess.run(command, capture_output=True, text=True)
        if process.returncode:
            raise BiasCompensationError(
                "what was exported cannot be loaded, and has been deleted:\n"
                + process.stderr[-2000:]
            )
        found = torch.load(files[1])
    _require_same(found, expected, plain, dtype)


@torch.no_grad()
def verify_kept(source: Path, exported: Path, whole: Compensation, device_map: str) -> None:
    """Compare a checkpoint that stays compensated with its source, both with their vectors."""
    model = _plain_model(source, device_map)
    whole.check(model)
    ids = _tokens(model)
    plain, expected = _logits(model, ids), _logits(model, ids, whole)
    del model
    model, kept = _plain_model(exported, device_map), Compensation.load(exported)
    kept.check(model)
    _require_same(_logits(model, ids, kept), expected, plain, next(model.parameters()).dtype)


def require_own_weights(source: Path) -> None:
    """Make sure, without loading a model, that vectors that were loaded belong to the weights.

    Raises:
        BiasCompensationError: they do not, or its files do not tell.
    """
    own = read_settings(source).get(KEY)
    entry = own or read_metadata(source / FILE).get(KEY, {})
    if FILES_DIGEST not in entry:
        raise BiasCompensationError(
            f"the vectors in {source} do not say which files' weights they belong to, as they were "
            "saved without bc_plugin.enable(); export it with verify=True (without --no-verify)."
        )
    if own:  # ``Compensation.load`` has compared those that lie beside a checkpoint
        require_bound(entry, checkpoint_files(source))


def _plain_model(folder: Path, device_map: str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    with _unsealed(folder) as unsealed:
        model = AutoModelForCausalLM.from_pretrained(unsealed, device_map=device_map).eval()
    attached = Compensation.attached_to(model)  # where the patches are enabled
    if attached is not None:
        attached.detach(model)
    return model


def _tokens(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, TOKENS), generator=generator)
    return ids.to(next(model.parameters()).device)


def _logits(model: nn.Module, ids: Tensor, compensation: Compensation | None = None) -> Tensor:
    if compensation is not None:
        compensation.attach_unchecked(model)
    logits = model(input_ids=ids).logits.float().cpu()
    if compensation is not None:
        compensation.detach(model)
    return logits


def _require_same(found: Tensor, expected: Tensor, plain: Tensor, dtype: torch.dtype) -> None:
    apart, effect = (found - expected).norm(), (plain - expected).norm()
    # Widened weights run on another kernel, which may round inputs to half precision.
    rounding = 4 * torch.finfo(dtype).eps * expected.norm()
    if not apart <= torch.maximum(0.25 * effect, rounding):
        raise BiasCompensationError(
            f"what was exported gives other logits than the plugin and has been deleted: they are "
            f"{apart:.3g} apart, where compensation moves them by {effect:.3g}. Please report this."
        )
