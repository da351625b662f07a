"""A quantized checkpoint's own files with vectors beside its weights.

Nothing of it goes through a loaded model, whose kernels may have repacked the weights. What stays
as it is goes from file to file; in memory are the vectors, and one tensor at a time.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..models.integers import PACKED
from ..models.offloaded import stored_value
from ..models.words import chosen_linears
from ..names import KEY, SUFFIX
from ..vectors.checkpoint import INDEX, SINGLE, checkpoint_files, other_files
from ..vectors.compensation import Compensation
from ..vectors.lazy import LazyTensor, tensors_in
from ..vectors.merge import OWN_BIAS
from ..vectors.settings import read_json
from ..vectors.splice import FORMAT, write_index, write_tensors
from ..vectors.written import write_entry

VECTORS = "model-bias_compensation.safetensors"  # beside a checkpoint of several files


def copy_compensated(source: Path, out: Path, compensation: Compensation, model: nn.Module) -> None:
    """Write the checkpoint in ``source`` to ``out``, a folder that is there, with these vectors.

    A checkpoint of one file stays one; files of a larger one that hold no vectors are copied as
    they are. Vectors that it has are left out.

    Args:
        model: What was loaded from ``source``. Where scales, norms or integers were fitted with the
            vectors, those are its own.

    Raises:
        BiasCompensationError: the checkpoint is damaged.
    """
    files = checkpoint_files(source)
    vectors = {name + SUFFIX: LazyTensor.of(v) for name, v in compensation.vectors.items()}
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
    vectors: dict[str, LazyTensor],
    fitted: nn.Module | None,
) -> None:
    places = {}
    for file in files:
        names = tensors_in(file, vectors=False)
        name = f"{file.stem}.safetensors"
        as_it_is = fitted is None and file.suffix == ".safetensors"
        if names and as_it_is and not tensors_in(file, vectors=True):
            # No hard link: it would share owner and mode, and whoever writes over a shard of one
            # checkpoint in place would damage the other.
            shutil.copy(file, out / name)
        elif names:
            _write(file, out / name, {}, fitted)
        places |= dict.fromkeys(names, name)
    write_tensors(out / VECTORS, vectors, FORMAT)
    places |= dict.fromkeys(vectors, VECTORS)
    found = sorted(source.glob("*.index.json"))
    about = read_json(found[0]).get("metadata", {}) if found else {}
    write_index(out / INDEX, about, dict(sorted(places.items())))


def _write(
    source: Path, file: Path, vectors: dict[str, LazyTensor], fitted: nn.Module | None
) -> None:
    tensors = tensors_in(source, vectors=False)
    metadata = dict(FORMAT)
    if source.suffix == ".safetensors":
        with safe_open(source, "pt") as opened:
            metadata |= opened.metadata() or {}
    metadata.pop(KEY, None)
    now = {key: _now(fitted, key, tensor) for key, tensor in tensors.items()}
    write_tensors(file, {**now, **vectors}, metadata)


def _now(model: nn.Module | None, key: str, stored: LazyTensor) -> LazyTensor:
    """A tensor of the files, or what the pass or refinement has made of it since."""
    path, _, leaf = key.rpartition(".")
    owner = None
    with suppress(AttributeError):  # what a loader calls otherwise is no part of a linear or norm
        owner = None if model is None else model.get_submodule(path)
    if leaf == "bias" and hasattr(owner, OWN_BIAS):
        leaf = OWN_BIAS  # a vector is merged into the other one
    loaded = getattr(owner, leaf, None)
    same_kind = isinstance(loaded, Tensor) and loaded.shape == stored.shape
    chosen = leaf in PACKED and owner is not None and path in chosen_linears(model)
    if not same_kind or not (stored.dtype.is_floating_point or chosen):
        return stored
    streamed = partial(stored_value, model, key)
    return LazyTensor(
        stored.dtype,
        stored.shape,
        partial(_changed, stored, streamed if loaded.is_meta else loaded.detach),
    )


def _changed(stored: LazyTensor, value: Callable[[], Tensor]) -> Tensor:
    """What is loaded, in the type of the file; what has not changed, to the bit."""
    before, loaded = stored.read(), value()
    same = torch.equal(before.to(loaded.dtype), loaded.cpu())
    return before if same else loaded.to(before.dtype)
