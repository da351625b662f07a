"""Quantization-aware training with torchao's fake quantization, to 4 bits throughout."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from fnmatch import fnmatch

import torch
from torch import nn
from torchao.quantization import quantize_
from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig


def prepared(model: nn.Module, keep: Sequence[str]) -> nn.Module:
    """A copy whose linears round weights and inputs, while it is trained and afterwards.

    Weights per output channel, symmetric; inputs per token, asymmetric, with ranges found as they
    come: torchao has no fixed ones per tensor.

    Args:
        keep: Patterns of the names of what stays float.
    """
    config = QATConfig(
        activation_config=IntxFakeQuantizeConfig(torch.int4, "per_token", is_symmetric=False),
        weight_config=IntxFakeQuantizeConfig(torch.int4, "per_channel"),
        step="prepare",
    )

    def wanted(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and not any(fnmatch(name, each) for each in keep)

    prepared = copy.deepcopy(model)
    quantize_(prepared, config, wanted)
    return prepared


def float_again(model: nn.Module) -> nn.Module:
    """A copy with the same weights and plain linears."""
    plain = copy.deepcopy(model)
    quantize_(plain, QATConfig(step="convert"))
    return plain
