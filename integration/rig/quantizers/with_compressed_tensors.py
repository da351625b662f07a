"""Checkpoints in the format that llm-compressor writes, rounded to nearest."""

from pathlib import Path

import torch


def round_to_nearest(
    source: str,
    folder: Path,
    symmetric: bool = True,
    actorder: bool = False,
    bits: int = 4,
    group_size: int = 32,
) -> None:
    """Write the model in ``source`` to ``folder``, packed.

    Args:
        actorder: Whether groups are of any input channels.
    """
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source)
    order = {"actorder": "group"} if actorder else {}
    weights = QuantizationArgs(
        num_bits=bits, strategy="group", group_size=group_size, symmetric=symmetric, **order
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    config = QuantizationConfig(
        config_groups={"group_0": scheme}, ignore=["lm_head"], format="pack-quantized"
    )
    apply_quantization_config(model, config)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            _set_grid(module, symmetric, actorder, bits, group_size)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)


def _set_grid(
    module: torch.nn.Module, symmetric: bool, actorder: bool, bits: int, size: int
) -> None:
    weight = module.weight.detach()
    order = torch.arange(weight.shape[1])
    if actorder:
        order = torch.randperm(len(order), generator=torch.Generator().manual_seed(0))
        module.weight_g_idx.data[order] = (torch.arange(len(order)) // size).to(module.weight_g_idx)
    groups = weight[:, order].view(len(weight), -1, size)
    if symmetric:
        module.weight_scale.data = groups.abs().amax(-1) / ((2**bits - 1) / 2)
        return
    low, high = groups.aminmax(dim=-1)
    module.weight_scale.data = (high - low) / (2**bits - 1)
    half = 2 ** (bits - 1)
    zeros = (-half - low / module.weight_scale).round().clamp(-half, half - 1)
    module.weight_zero_point.data = zeros.to(module.weight_zero_point)
