"""Fused linears (Phi-3's ``qkv_proj``) as the separate ones of a Llama, without changing a value.

The output channels of a fused linear are those of its parts, one after the other. A quantized
weight has scales and zero points per output channel, so it can be cut between two of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from .errors import BiasCompensationError
from .packing import WORD

# By fused linear, the parts and how many output channels each has.
Fused = Mapping[str, Mapping[str, int]]
# Where the output channels are, in what GPTQ and AWQ store and in a float weight.
CHANNELS = {"qweight": 1, "qzeros": 1, "scales": 1, "weight": 0, "bias": 0}


def phi3(config: Mapping[str, Any]) -> Fused:
    """The fused linears of Phi-3."""
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    key_width = (config.get("num_key_value_heads") or heads) * width
    attention = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    return {
        "self_attn.qkv_proj": dict(
            zip(attention, (heads * width, key_width, key_width), strict=True)
        ),
        "mlp.gate_up_proj": dict.fromkeys(
            ("mlp.gate_proj", "mlp.up_proj"), config["intermediate_size"]
        ),
    }


def parts_of(linear: str, vector: Tensor, fused: Fused) -> dict[str, Tensor]:
    """By linear that it stands for in the end, the part of a linear's vector, (features,)."""
    if linear not in fused:
        return {linear: vector}
    parts = fused[linear]
    return dict(zip(parts, vector.split(list(parts.values())), strict=True))


def unfuse(tensors: dict[str, Tensor], fused: Fused, blocks: str) -> None:
    """Cut every fused linear in ``tensors`` (a whole checkpoint), in place.

    Args:
        blocks: Path of the list of blocks, in which the linears are.

    Raises:
        BiasCompensationError: a part would begin in the middle of a packed word.
    """
    for key in list(tensors):
        index, _, inside = key.removeprefix(f"{blocks}.").partition(".")
        linear, _, leaf = inside.rpartition(".")
        if linear not in fused:
            continue
        whole = tensors.pop(key)
        for part, piece in zip(fused[linear], _pieces(key, whole, fused[linear]), strict=True):
            tensors[f"{blocks}.{index}.{part}.{leaf}"] = piece


def _pieces(key: str, whole: Tensor, parts: Mapping[str, int]) -> Iterator[Tensor]:
    leaf, total = key.rpartition(".")[2], sum(parts.values())
    if leaf == "g_idx":  # by input channel, which all parts share
        yield from (whole.clone() for _ in parts)
        return
    if leaf not in CHANNELS:
        raise BiasCompensationError(
            f"{key} is of no format that can be cut into parts; export GPTQ or AWQ checkpoints."
        )
    axis = CHANNELS[leaf]
    stored = whole.shape[axis]
    for part, width in parts.items():
        # Values that straddle words (3 bits) begin anew every 32 of them.
        aligned = stored == total or width % WORD == 0
        if not aligned or width * stored % total:
            raise BiasCompensationError(
                f"{key} cannot be cut into {list(parts)}: the {width} output channels of {part} "
                f"are no multiple of {WORD}, so they share packed words."
            )
    for piece in whole.split([width * stored // total for width in parts.values()], axis):
        yield piece.clone()
