"""A GPTQ checkpoint of rounded weights: the format without the toolkit, for any architecture."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bc_plugin.models.packed import pack

BITS, ZERO = 4, 8


def round_to_gptq(source: Path, folder: Path, group_size: int = 32) -> None:
    """Write ``source``, whose linears within blocks are rounded down to symmetric 4 bits.

    Down, so that their outputs are shifted.
    """
    folder.mkdir()
    tensors, rounded = load_file(source / "model.safetensors"), {}
    for name, tensor in tensors.items():
        if tensor.dim() == 2 and "layers." in name and name.endswith(".weight"):
            rounded |= packed(name.removesuffix(".weight"), tensor, group_size)
        else:
            rounded[name] = tensor
    save_file(rounded, folder / "model.safetensors", metadata={"format": "pt"})
    config: dict[str, Any] = json.loads((source / "config.json").read_text())
    config["quantization_config"] = gptq_settings(group_size)
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def gptq_settings(group_size: int) -> dict[str, Any]:
    """The ``quantization_config`` of what ``packed`` gives."""
    return {
        "quant_method": "gptq",
        "bits": BITS,
        "group_size": group_size,
        "desc_act": False,
        "sym": True,
        "checkpoint_format": "gptq",
    }


def packed(
    name: str,
    weight: Tensor,
    group_size: int,
    rounding: Callable[[Tensor], Tensor] = torch.floor,
) -> dict[str, Tensor]:
    """A linear's tensors, of its weight (out_features, in_features)."""
    groups = weight.float().T.reshape(-1, group_size, len(weight))  # inputs in groups, outputs
    scales = (groups.abs().amax(1) / (ZERO - 1)).to(weight.dtype)
    values = rounding(groups / scales.float()[:, None]).clamp(-ZERO, ZERO - 1) + ZERO
    zeros = torch.full_like(scales, ZERO - 1, dtype=torch.int64)  # stored less one
    inputs = weight.shape[1]
    return {
        f"{name}.qweight": pack(values.reshape(inputs, -1).long(), BITS, dim=0),
        f"{name}.qzeros": pack(zeros, BITS, dim=1),
        f"{name}.scales": scales.contiguous(),
        f"{name}.g_idx": (torch.arange(inputs) // group_size).to(torch.int32),
    }
