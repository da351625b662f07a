"""The plain checkpoint: its tensors read, biases set, and written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from ..errors import BiasCompensationError
from ..models.architectures import ALWAYS, Architecture
from ..names import KEY
from ..vectors.checkpoint import INDEX, checkpoint_files, other_files
from ..vectors.compensation import Compensation
from ..vectors.lazy import LazyTensor, tensors_in
from ..vectors.sealed import unseal
from ..vectors.settings import CONFIG, SETTINGS
from ..vectors.splice import FORMAT, write_index, write_tensors
from .plan import Plan


def read_tensors(folder: Path) -> dict[str, LazyTensor]:
    """All tensors of a checkpoint but the vectors; they stay in its files.

    Raises:
        BiasCompensationError: a file is damaged, or has a name that transformers does not load.
    """
    files = [f for f in checkpoint_files(folder) if fnmatch(f.name, "model*.safetensors")]
    if not files:
        raise BiasCompensationError(
            f"{folder} holds no model.safetensors, nor shards of one. Save it as safetensors; a "
            "file that AutoGPTQ named otherwise has to be renamed to that, as for transformers."
        )
    return dict(pair for path in files for pair in tensors_in(path, vectors=False).items())


def dtype_in(config: Mapping[str, Any]) -> torch.dtype:
    return getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or "float32"))


def set_biases(
    tensors: dict[str, LazyTensor],
    plan: Plan,
    architecture: Architecture,
    config: dict[str, Any],
    compensation: Compensation,
) -> None:
    """Put the biases in place, and zeros where a flag makes an engine expect one."""
    dtype = dtype_in(config)
    prefix = f"{compensation.blocks[0]}."
    inside = [key.removeprefix(prefix) for key in tensors if key.startswith(prefix)]
    blocks = sorted({key.partition(".")[0] for key in inside})
    for flag, linears in architecture.flags.items():
        names = [f"{prefix}{block}.{linear}" for block in blocks for linear in linears]
        stored = {name: tensors.get(f"{name}.bias") for name in names}
        present = {name: None if bias is None else bias.read() for name, bias in stored.items()}
        in_use = any(name in plan.biases for name in names) or any(
            bias is not None and bool(bias.any()) for bias in present.values()
        )
        if not in_use:
            continue
        if flag != ALWAYS:
            config[flag] = True
        for name, bias in present.items():
            width = _width(tensors, name, compensation)
            base = torch.zeros(width, dtype=torch.float64) if bias is None else bias.double()
            whole = (base + plan.biases.get(name, 0)).to(dtype if bias is None else bias.dtype)
            if not bool(torch.isfinite(whole).all()):
                raise BiasCompensationError(
                    f"the bias of {name} does not fit into {whole.dtype}; export a checkpoint "
                    "in bfloat16 or float32."
                )
            tensors[f"{name}.bias"] = LazyTensor.of(whole)


def _width(tensors: Mapping[str, LazyTensor], name: str, compensation: Compensation) -> int:
    """out_features of a linear, from its vector or from whatever else is stored of it."""
    if name in compensation.vectors:
        return compensation.vectors[name].shape[-1]
    for leaf, axis in (("scales", -1), ("bias", 0), ("weight", 0)):
        if f"{name}.{leaf}" in tensors:
            return tensors[f"{name}.{leaf}"].shape[axis]
    raise BiasCompensationError(f"the checkpoint has no {name}, which its architecture announces.")


def write_checkpoint(
    folder: Path, source: Path, tensors: Mapping[str, LazyTensor], config: dict[str, Any]
) -> None:
    """Write ``tensors`` and ``config``, and whatever else the folder ``source`` holds.

    One tensor at a time is in memory. Shards are those of ``save_pretrained``, of up to 5 GB.
    """
    _write_shards(folder, tensors)
    for file in other_files(source):
        if file.name not in (CONFIG, SETTINGS):
            shutil.copy2(file, folder / file.name)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    own = source / SETTINGS
    if own.is_file() and "quantization_config" in config:
        settings = unseal(json.loads(own.read_text(encoding="utf-8")))
        settings.pop(KEY, None)
        widened = config["quantization_config"]
        settings |= {name: widened[name] for name in settings if name in widened}
        (folder / own.name).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _write_shards(folder: Path, tensors: Mapping[str, LazyTensor]) -> None:
    from huggingface_hub import split_torch_state_dict_into_shards

    shapes = {name: tensor.empty() for name, tensor in tensors.items()}
    split = split_torch_state_dict_into_shards(shapes)
    for file, names in split.filename_to_tensors.items():
        write_tensors(folder / file, {name: tensors[name] for name in names}, FORMAT)
    if split.is_sharded:
        write_index(folder / INDEX, {**split.metadata, **FORMAT}, split.tensor_to_filename)
