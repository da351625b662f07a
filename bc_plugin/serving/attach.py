"""A compensation put in place in a model of vLLM's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase

from ..errors import BiasCompensationError
from ..models.modules import device_of
from ..names import KEY
from .files import folder_of, read_vectors_of
from .methods import FOLDED, add_to_block, set_table, with_vectors, without_vectors
from .placing import fold_blocks, in_vllm, is_elsewhere, parts_of
from .rows import follow_positions, rows_for
from .shares import share, stacked

logger = init_logger("vllm.bc_plugin")


def attach(model: nn.Module, entry: Mapping[str, Any], vllm_config: Any, model_config: Any) -> None:
    """Read the vectors of a model that vLLM has just loaded, and put this process's in place.

    Raises:
        BiasCompensationError: they are damaged or belong to another checkpoint, or some of them
            cannot be put in place here.
    """
    folder = folder_of(model_config, vllm_config.load_config)
    # All files are read once more for that; one process of several is enough.
    bound = get_tensor_model_parallel_rank() == 0
    found = in_vllm(read_vectors_of(entry, folder, bound), model)
    vectors = fold_blocks(found, model, model_config.hf_text_config.to_dict())
    rows = None
    if found.positions:
        rows = rows_for(vllm_config, found.positions, device_of(model))
        follow_positions(model, rows, found.positions, vllm_config)
    placed = _put_linears(model, vectors, rows, model_config.dtype)
    blocks = {name for name, kind in found.kinds.items() if kind == "block"} & set(vectors)
    placed |= _put_blocks(model, {name: vectors[name] for name in blocks}, rows, model_config.dtype)
    left = [name for name in vectors if name not in placed and not is_elsewhere(model, name)]
    if left:
        raise BiasCompensationError(
            f"{len(left)} of {len(found.vectors)} vectors in {folder} have no place in vLLM's "
            f"{type(model).__name__}, the first is {left[0]}.{KEY}: it has no such linear (as with "
            "experts, which it has in one), or the vectors are another model's. Compensate blocks "
            "alone with sites='block' (--sites block), or serve it with transformers."
        )
    logger.info("Bias compensation: the vectors of %d sites are in place.", len(found.vectors))


def _put_linears(
    model: nn.Module, vectors: Mapping[str, Tensor], rows: Tensor | None, dtype: Any
) -> set[str]:
    """Give every linear what it adds; returns the names of what it stands for."""
    placed: set[str] = set()
    packed = getattr(model, "packed_modules_mapping", None) or {}
    for name, layer in model.named_modules():
        if not isinstance(layer, LinearBase):
            continue
        parts = parts_of(name, packed, vectors)
        if not parts:
            without_vectors(layer)
            continue
        if name.endswith(FOLDED):
            raise BiasCompensationError(
                f"{name} has vectors, but vLLM folds it into other products, where there is no "
                "place for them; compensate blocks alone with sites='block' (--sites block)."
            )
        table = share(layer, stacked(name, layer, parts, vectors))
        placed.update(parts)
        if table is None:
            without_vectors(layer)
        else:
            with_vectors(layer, table.to(device_of(layer), dtype), rows)
    return placed


def _put_blocks(
    model: nn.Module, vectors: Mapping[str, Tensor], rows: Tensor | None, dtype: Any
) -> set[str]:
    """Add to the outputs of blocks, where no linear does it for them."""
    modules = dict(model.named_modules())
    for name in vectors:
        if name in modules and not is_elsewhere(model, name):
            block = modules[name]
            set_table(block, vectors[name].to(device_of(block), dtype), rows)
            block.register_forward_hook(add_to_block)
    return set(vectors) & set(modules)
