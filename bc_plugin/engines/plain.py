"""The plain checkpoint: its tensors read, biases set, and written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..errors import BiasCompensationError
from ..models.architectures import ALWAYS, Architecture
from ..names import KEY, SUFFIX
from ..vectors.compensation import Compensation
from ..vectors.sealed import unseal
from .plan import Plan

CONFIGS = ("config.json", "quantize_config.json")


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint but the vectors."""
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise BiasCompensationError(
            f"{folder} holds no model.safetensors, nor shards of one. Save it as safetensors; a "
            "file that AutoGPTQ named otherwise has to be renamed to that, as for transformers."
        )
    tensors = {}
    for path in files:
        with safe_open(path, "pt") as file:
            tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return {key: tensor for key, tensor in tensors.items() if not key.endswith(SUFFIX)}


def dtype_in(config: Mapping[str, Any]) -> torch.dtype:
    return getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or "float32"))


def set_biases(
    tensors: dict[str, Tensor],
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
        present = {name: tensors.get(f"{name}.bias") for name in names}
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
            tensors[f"{name}.bias"] = whole


def _width(tensors: Mapping[str, Tensor], name: str, compensation: Compensation) -> int:
    """out_features of a linear, from its vector or from whatever else is stored of it."""
    if name in compensation.vectors:
        return compensation.vectors[name].shape[-1]
    for leaf, axis in (("scales", -1), ("bias", 0), ("weight", 0)):
        if f"{name}.{leaf}" in tensors:
            return tensors[f"{name}.{leaf}"].shape[axis]
    raise BiasCompensationError(f"the checkpoint has no {name}, which its architecture announces.")


def write_checkpoint(
    folder: Path, source: Path, tensors: dict[str, Tensor], config: dict[str, Any]
) -> None:
    """Write ``tensors`` and ``config``, and whatever else the folder ``source`` holds."""
    from huggingface_hub import save_torch_state_dict

    save_torch_state_dict(tensors, folder, metadata={"format": "pt"})
    for file in source.iterdir():
        weights = file.suffix in (".safetensors", ".bin") or file.name.endswith(".index.json")
        if file.is_file() and not weights and file.name not in CONFIGS:
            shutil.copy2(file, folder / file.name)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    own = source / "quantize_config.json"
    if own.is_file() and "quantization_config" in config:
        settings = unseal(json.loads(own.read_text(encoding="utf-8")))
        settings.pop(KEY, None)
        widened = config["quantization_config"]
        settings |= {name: widened[name] for name in settings if name in widened}
        (folder / own.name).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
