"""A quantized checkpoint's own files with vectors beside its weights.

Nothing of it goes through a loaded model, whose kernels may have repacked the weights.
"""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..models.offloaded import stored_value
from ..names import KEY, SUFFIX
from ..vectors.checkpoint import INDEX, SINGLE, checkpoint_files, other_files, tensors_in
from ..vectors.compensation import Compensation
from ..vectors.merge import OWN_BIAS
from ..vectors.settings import read_json
from ..vectors.written import write_entry

VECTORS = "model-bias_compensation.safetensors"  # beside a checkpoint of several files


def copy_compensated(source: Path, out: Path, compensation: Compensation, model: nn.Module) -> None:
    """Write the checkpoint in ``source`` to ``out``, a folder that is there, with these vectors.

    A checkpoint of one file stays one; files of a larger one that hold no vectors are copied as
    they are. Vectors that it has are left out.

    Args:
        model: What was loaded from ``source``. Where scales or norms were fitted with the vectors,
            those are its own.

    Raises:
        BiasCompensationError: the checkpoint is damaged.
    """
    files = checkpoint_files(source)
    vectors = {name + SUFFIX: v.contiguous().cpu() for name, v in compensation.vectors.items()}
    fitted = model if compensation.scales else None
    if len(files) == 1:
        name = files[0].name if files[0].suffix == ".safetensors" else SINGLE
        _write(files[0], out / name, vectors, fitted)
    else:
        _write_several(source, files, out, vectors, fitted)
    for file in other_files(source):
        shutil.copy(file, out / file.name)
    write_entry(out, compensation.entry())


def _write_several(
    source: Path,
    files: list[Path],
    out: Path,
    vectors: dict[str, Tensor],
    fitted: nn.Module | None,
) -> None:
    places = {}
    for file in files:
        names = [key for key, _ in tensors_in(file, vectors=False)]
        name = f"{file.stem}.safetensors"
        as_it_is = fitted is None and file.suffix == ".safetensors"
        if names and as_it_is and not any(tensors_in(file, vectors=True)):
            shutil.copy(file, out / name)
        elif names:
            _write(file, out / name, {}, fitted)
        places |= dict.fromkeys(names, name)
    save_file(vectors, out / VECTORS, metadata={"format": "pt"})
    places |= dict.fromkeys(vectors, VECTORS)
    found = sorted(source.glob("*.index.json"))
    about = read_json(found[0]).get("metadata", {}) if found else {}
    index = {"metadata": about, "weight_map": dict(sorted(places.items()))}
    (out / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write(source: Path, file: Path, vectors: dict[str, Tensor], fitted: nn.Module | None) -> None:
    tensors = {key: _now(fitted, key, t) for key, t in tensors_in(source, vectors=False)}
    metadata = {"format": "pt"}
    if source.suffix == ".safetensors":
        with safe_open(source, "pt") as opened:
            metadata |= opened.metadata() or {}
    metadata.pop(KEY, None)
    save_file({**tensors, **vectors}, file, metadata=metadata)


def _now(model: nn.Module | None, key: str, stored: Tensor) -> Tensor:
    """A tensor of the files, or what has become of a scale or a norm since it was loaded."""
    path, _, leaf = key.rpartition(".")
    owner = None
    with suppress(AttributeError):  # what a loader calls otherwise is no part of a linear or norm
        owner = None if model is None else model.get_submodule(path)
    if leaf == "bias" and hasattr(owner, OWN_BIAS):
        leaf = OWN_BIAS  # a vector is merged into the other one
    loaded = getattr(owner, leaf, None)
    if isinstance(loaded, Tensor) and loaded.is_meta:  # of a streamed model
        loaded = stored_value(model, key)
    if not stored.is_floating_point():
        return stored.contiguous()
    same_kind = isinstance(loaded, Tensor) and not loaded.is_meta and loaded.shape == stored.shape
    if not same_kind or torch.equal(stored.to(loaded.dtype), loaded.detach().cpu()):
        return stored.contiguous()
    return loaded.detach().cpu().to(stored.dtype).contiguous()
