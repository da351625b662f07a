"""Reading settings and vectors out of checkpoint files."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..names import SUFFIX
from .sealed import unseal


def checkpoint_files(folder: str | Path) -> list[Path]:
    """The weight files of a checkpoint: safetensors where there are any, else PyTorch's."""
    folder = Path(folder)
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))


def read_settings(folder: str | Path) -> dict[str, Any]:
    """The quantization settings of a checkpoint, wherever its toolkit keeps them."""
    for name, section in (("config.json", "quantization_config"), ("quantize_config.json", None)):
        path = Path(folder) / name
        settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        settings = settings.get(section) if section else settings
        if settings:
            return unseal(settings)
    return {}


def read_vectors(files: Iterable[str | Path]) -> dict[str, Tensor]:
    """The compensation tensors in a checkpoint's files, by site name."""
    vectors = {}
    for path in files:
        if str(path).endswith(".safetensors"):
            with safe_open(path, "pt") as file:
                for key in file.keys():  # noqa: SIM118, not a dict
                    if key.endswith(SUFFIX):
                        vectors[key.removesuffix(SUFFIX)] = file.get_tensor(key)
        elif str(path).endswith(".bin"):
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            for key, tensor in state.items():
                if key.endswith(SUFFIX):
                    vectors[key.removesuffix(SUFFIX)] = tensor.clone()
    return vectors
