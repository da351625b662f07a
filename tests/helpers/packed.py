"""Checkpoints of GPTQ and AWQ, made without a toolkit."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from bc_plugin.models.packed import AWQ_ORDER

WORD = 32


def packed_checkpoint(
    folder: Path, model: nn.Module, method: str = "gptq", bits: int = 4, group: int = 8, **settings
) -> nn.Module:
    """Round a llama to nearest and write it; returns the model with the weights that this means.

    Groups of GPTQ are of any input channels, as after activation order.
    """
    settings = {"quant_method": method, "bits": bits, "group_size": group, **settings}
    if method == "awq":
        settings["version"] = "gemm"
    tensors = dict(model.state_dict())
    with torch.no_grad():
        for name, linear in model.named_modules():
            if isinstance(linear, nn.Linear) and "lm_head" not in name:
                own, weight = _rounded(linear, settings)
                tensors.pop(f"{name}.weight")
                tensors |= {f"{name}.{leaf}": tensor for leaf, tensor in own.items()}
                linear.weight.copy_(weight.T)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    config |= {"dtype": str(model.dtype).removeprefix("torch."), "quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    return model


def _rounded(linear: nn.Linear, settings: dict) -> tuple[dict[str, Tensor], Tensor]:
    """What is stored of a linear, and its weight, (in_features, out_features)."""
    bits, group = settings["bits"], settings["group_size"]
    weight = linear.weight.T.double()
    groups = torch.arange(len(weight)) // group
    if settings["quant_method"] == "gptq":
        groups = groups[torch.randperm(len(groups), generator=torch.Generator().manual_seed(0))]
    parts = [weight[groups == number] for number in range(int(groups.max()) + 1)]
    low, high = (torch.stack([f(part, 0).values for part in parts]) for f in (torch.min, torch.max))
    scales = ((high - low) / (2**bits - 1)).to(linear.weight.dtype)
    zeros = (-low / scales).round().clamp(1, 2**bits - 1).long()
    integers = (weight / scales[groups] + zeros[groups]).round().clamp(0, 2**bits - 1).long()
    stored = {"scales": scales}
    if settings["quant_method"] == "awq":
        stored["qweight"], stored["qzeros"] = (
            words(_in_awq_order(values), bits, dim=1) for values in (integers, zeros)
        )
    else:
        less = 0 if settings.get("checkpoint_format") == "gptq_v2" else 1
        stored["qweight"] = words(integers, bits, dim=0)
        stored["qzeros"], stored["g_idx"] = words(zeros - less, bits, dim=1), groups.int()
    return stored, (scales[groups] * (integers - zeros[groups])).to(linear.weight.dtype)


def _in_awq_order(values: Tensor) -> Tensor:
    return values.view(len(values), -1, len(AWQ_ORDER))[..., list(AWQ_ORDER)].flatten(1)


def words(values: Tensor, bits: int, dim: int) -> Tensor:
    """Integers one after the other along ``dim``, the first in the lowest bits, in 32-bit words."""
    values = values.movedim(dim, -1)
    ones = values[..., None] >> torch.arange(bits) & 1
    ones = ones.flatten(-2).unflatten(-1, (-1, WORD))
    found = (ones << torch.arange(WORD)).sum(-1)
    return torch.where(found >= 2**31, found - 2**32, found).int().movedim(-1, dim).contiguous()
