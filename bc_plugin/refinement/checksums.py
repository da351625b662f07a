"""Fingerprints of what a run of the refinement depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..models.float_blocks import BlockSnapshot
from ..models.modules import stored_tensors
from ..models.offloaded import stored_value

# What of a config says nothing about what its model computes, or changes as it is used.
NOT_THE_MODEL = ("transformers_version", "use_cache", "dtype", "torch_dtype")


def checksum(value: Any) -> str:
    """A fingerprint of tensors, plain values, and mappings and sequences of them.

    Tensors count with type, shape and every byte; the order in a mapping does not.
    """
    found = hashlib.sha256()
    _add(found, value)
    return found.hexdigest()[:32]


def model_checksum(model: nn.Module) -> str:
    """A fingerprint of a float model: all of its weights, and its config.

    Every byte is read, which takes a second or less per gigabyte and is little beside one run of
    the model: a sample would miss a single channel or token that another model has otherwise.
    """
    found = hashlib.sha256()
    config = getattr(model, "config", None)
    if hasattr(config, "to_dict"):
        settings = {k: v for k, v in config.to_dict().items() if k not in NOT_THE_MODEL}
        settings = {k: v for k, v in settings.items() if not k.startswith("_")}
        _add(found, json.dumps(settings, sort_keys=True, default=str))
    for name, tensor in _weights(model):
        _add(found, [name, tensor])
    return found.hexdigest()[:32]


def snapshot_checksum(blocks: BlockSnapshot) -> str:
    """A fingerprint of the weights of a float model's blocks."""
    found = hashlib.sha256()
    for name in blocks.skeletons:
        with blocks.load(name, torch.device("cpu")) as block:
            _add(found, [name, dict(stored_tensors(block))])
    return found.hexdigest()[:32]


def surroundings_checksum(model: nn.Module, lists: Sequence[str]) -> str:
    """A fingerprint of a model's weights outside of its lists of blocks."""
    found = hashlib.sha256()
    for name, tensor in _weights(model, lists):
        _add(found, [name, tensor])
    return found.hexdigest()[:32]


def _add(found: Any, value: Any) -> None:
    if isinstance(value, Tensor) and is_traceable_wrapper_subclass(value):
        value = {name: getattr(value, name) for name in value.__tensor_flatten__()[0]}
    if isinstance(value, Tensor):
        found.update(f"{value.dtype}{tuple(value.shape)}".encode())
        plain = value.detach().cpu().contiguous().reshape(-1)
        found.update(plain.view(torch.uint8).numpy())
    elif isinstance(value, Mapping):
        found.update(f"{{{len(value)}}}".encode())
        for key in sorted(value, key=str):
            _add(found, str(key))
            _add(found, value[key])
    elif isinstance(value, (list, tuple)):
        found.update(f"[{len(value)}]".encode())
        for item in value:
            _add(found, item)
    else:
        text = repr(value).encode()
        found.update(f"{len(text)}:".encode() + text)


def _weights(model: nn.Module, without: Sequence[str] = ()) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers, by name, also those that are kept elsewhere.

    Args:
        without: Paths of modules that are left out.
    """
    inside = tuple(f"{path}." for path in without)
    for path, module in model.named_modules(remove_duplicate=False):
        if path in without or path.startswith(inside):
            continue
        for name, tensor in {**module._parameters, **module._buffers}.items():
            if tensor is not None and name not in module._non_persistent_buffers_set:
                full = f"{path}.{name}" if path else name
                yield full, stored_value(model, full)
