"""A checkpoint's weights as plain floats, to compare kernels with."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from bc_plugin import Compensation
from bc_plugin.engines.dequantize import dequantize
from bc_plugin.engines.plain import read_tensors
from bc_plugin.names import KEY
from bc_plugin.vectors.settings import read_settings


def dequantized(folder: Path) -> nn.Module:
    """A model in float32 on the CPU, with the checkpoint's vectors if it has some.

    GPTQ's and AWQ's weights are worked out here; those of compressed-tensors by itself, in PyTorch.
    """
    settings = read_settings(folder)
    if settings["quant_method"] == "compressed-tensors":
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        attached = Compensation.attached_to(model)
        assert (attached is None) == (KEY not in settings)
        return model
    tensors = read_tensors(folder)
    dequantize(tensors, settings, torch.float32)
    config = json.loads((folder / "config.json").read_text())
    for key in ("quantization_config", "dtype", "torch_dtype"):
        config.pop(key, None)
    config = AutoConfig.for_model(**config)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.load_state_dict({name: tensor.read() for name, tensor in tensors.items()}, strict=True)
    if KEY in settings:
        Compensation.load(folder).attach_unchecked(model)
    return model
