"""An importance matrix for llama.cpp's quantizer: the mean square of each input of a linear."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor, nn


@torch.no_grad()
def write_imatrix(model: nn.Module, batches: Iterable[dict[str, Tensor]], path: Path) -> Path:
    """Run a float model as ``llama-imatrix`` does, and write what ``llama_quantizer.py`` reads."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    handles = []

    def observe(name: str):
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows = inputs[0].flatten(0, -2).double()
            sums[name] = sums.get(name, 0) + rows.square().sum(0)
            counts[name] = counts.get(name, 0) + len(rows)

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_pre_hook(observe(name)))
    for batch in batches:
        model(**batch)
    for handle in handles:
        handle.remove()
    config = model.config
    (kind,) = (arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == config.model_type)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    found = {
        f"{names.get_name(name)}.weight": (total / counts[name]).float().numpy()
        for name, total in sums.items()
    }
    np.savez(path, **found)
    return path
