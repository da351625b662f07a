"""What the modules of a checkpoint are called in vLLM, and what they are there."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from vllm.model_executor.models.utils import PPMissingLayer

from ..models.architectures import ARCHITECTURES
from ..vectors.compensation import Compensation


def in_vllm(compensation: Compensation, model: nn.Module) -> Compensation:
    """The same vectors by the paths that vLLM's model has."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    if mapper is None:
        return compensation
    rename = mapper.get_rename_mapper().map_name
    return compensation.renamed(lambda name: rename(name) or name)


def parts_of(
    name: str, packed: Mapping[str, Sequence[str]], vectors: Collection[str]
) -> Sequence[str]:
    """The linears of the checkpoint that vLLM has in one.

    Args:
        name: vLLM's.
        packed: What vLLM's model says of its own.

    Returns:
        Their paths, in order; none where none of them has vectors.
    """
    if name in vectors:
        return [name]
    parent, dot, leaf = name.rpartition(".")
    parts = [f"{parent}{dot}{part}" for part in packed.get(leaf, ())]
    return parts if any(part in vectors for part in parts) else ()


def fold_blocks(
    compensation: Compensation, model: nn.Module, config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """All vectors, those of blocks within those of the linear that ends them where one does.

    Args:
        config: Of the model, as in its ``config.json``.
    """
    architecture = ARCHITECTURES.get(config.get("model_type", ""))
    vectors = dict(compensation.vectors)
    factor = None if architecture is None else architecture.factor(config)
    if factor is None or architecture.last is None:
        return vectors
    modules = {name for name, _ in model.named_modules()}
    for name, kind in compensation.kinds.items():
        last = f"{name}.{architecture.last}"
        if kind == "block" and last in modules:
            vectors[last] = vectors.pop(name).float() / factor + vectors.get(last, 0)
    return vectors


def is_elsewhere(model: nn.Module, name: str) -> bool:
    """Whether another stage of a pipeline has the module."""
    module = model
    for part in name.split("."):
        if isinstance(module, PPMissingLayer):
            return True
        module = getattr(module, part, None)
        if module is None:
            return False
    return isinstance(module, PPMissingLayer)
