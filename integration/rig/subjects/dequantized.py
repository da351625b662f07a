"""A checkpoint's weights as plain floats, to compare kernels with."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from bc_plugin import Compensation
from bc_plugin.engines.dequantize import dequantize
from bc_plugin.names import SUFFIX
from bc_plugin.vectors.settings import read_settings


def dequantized(folder: Path) -> nn.Module:
    """A model in float32 on the CPU, with the checkpoint's vectors if it has some.

    GPTQ's and AWQ's weights are worked out here; those of compressed-tensors by itself, in PyTorch.
    """
    settings = read_settings(folder)
    if settings["quant_method"] == "compressed-tensors":
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        attached = Compensation.attached_to(model)
        assert (attached is None) == ("bias_compensation" not in settings)
        return model
    tensors = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
    dequantize(tensors, settings, torch.float32)
    config = json.loads((folder / "config.json").read_text())
    for key in ("quantization_config", "dtype", "torch_dtype"):
        config.pop(key, None)
    config = AutoConfig.for_model(**config)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    weights = {name: value for name, value in tensors.items() if not name.endswith(SUFFIX)}
    model.load_state_dict(weights, strict=True)
    if len(weights) < len(tensors):
        Compensation.load(folder).attach_unchecked(model)
    return model
