"""The share of a linear's vectors that one process of vLLM's tensor parallelism adds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

from ..errors import BiasCompensationError
from ..names import KEY

# Linears for q, k and v in one, whose outputs a checkpoint has one after the other. Others have
# them head by head, and vLLM's models put them in order as they load them.
IN_ORDER = ("qkv_proj", "c_attn", "Wqkv")


def stacked(
    name: str, layer: LinearBase, parts: Sequence[str], vectors: Mapping[str, Tensor]
) -> Tensor:
    """The vectors of what vLLM has in one linear, one beside the other; zeros where there are none.

    Args:
        name: vLLM's name of the linear, for errors.
        parts: The linears it is made of, by their names in ``vectors``.

    Returns:
        (positions + 1, features of all processes).

    Raises:
        BiasCompensationError: they do not fit.
    """
    widths = [width for width, _, _ in _parts(layer)]
    if len(parts) == 1:
        widths = [sum(widths)]
        leaf = name.rpartition(".")[2]
        if isinstance(layer, QKVParallelLinear) and leaf not in IN_ORDER:
            raise BiasCompensationError(
                f"{name}: which of its vectors' values are q, k and v is not known here, so vLLM "
                f"cannot be given them; known are {', '.join(IN_ORDER)}. Serve the model with "
                "transformers and the plugin, or export it with `bc-plugin export --for vllm`."
            )
    if len(parts) != len(widths):
        raise BiasCompensationError(
            f"{name} has {len(widths)} parts in vLLM, but {', '.join(parts)} in the checkpoint; "
            "please report this."
        )
    rows = next(len(vectors[part]) for part in parts if part in vectors)
    found = [
        vectors[part].float() if part in vectors else torch.zeros(rows, width)
        for part, width in zip(parts, widths, strict=True)
    ]
    for part, table, width in zip(parts, found, widths, strict=True):
        if table.shape != (rows, width):
            raise BiasCompensationError(
                f"{part}.{KEY} has shape {tuple(table.shape)}, expected {(rows, width)}; these "
                "vectors belong to another model."
            )
    return torch.cat(found, -1)


def share(layer: LinearBase, table: Tensor) -> Tensor | None:
    """What this process adds of a whole table; None where another one adds it for all."""
    if isinstance(layer, RowParallelLinear):
        return None if layer.tp_rank else table  # their outputs are summed
    pieces = table.split([width for width, _, _ in _parts(layer)], -1)
    mine = [
        piece[:, start : start + length]
        for piece, (_, start, length) in zip(pieces, _parts(layer), strict=True)
    ]
    return torch.cat(mine, -1)


def _parts(layer: LinearBase) -> list[tuple[int, int, int]]:
    """Of each part: its whole width, and from where on how much this process has."""
    if isinstance(layer, QKVParallelLinear):
        queries, own = layer.num_heads * layer.head_size, layer.num_kv_heads
        group = layer.tp_rank // layer.num_kv_head_replicas
        parts = [(layer.total_num_heads * layer.head_size, layer.tp_rank * queries, queries)]
        for size in (layer.head_size, layer.v_head_size):
            length = own * size
            parts.append((layer.total_num_kv_heads * size, group * length, length))
        return parts
    if isinstance(layer, MergedColumnParallelLinear):
        sizes = layer.output_sizes
    else:
        sizes = [layer.output_size]
    if isinstance(layer, (RowParallelLinear, ReplicatedLinear)):
        return [(size, 0, size) for size in sizes]
    if not isinstance(layer, ColumnParallelLinear):
        raise BiasCompensationError(
            f"{layer.prefix} is a {type(layer).__name__}, of which it is not known here how its "
            "outputs are spread over processes."
        )
    lengths = [size // layer.tp_size for size in sizes]
    return [
        (size, layer.tp_rank * length, length) for size, length in zip(sizes, lengths, strict=True)
    ]
