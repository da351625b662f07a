"""Fused linears (Phi-3's ``qkv_proj``) as the separate ones of a Llama, without changing a value.

The output channels of a fused linear are those of its parts, one after the other. A quantized
weight has scales and zero points per output channel, so it can be cut between two of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from ..errors import BiasCompensationError
from ..models.packed import WORD
from ..vectors.lazy import LazyTensor

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


def unfuse(tensors: dict[str, LazyTensor], fused: Fused, blocks: str) -> None:
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


def _pieces(key: str, whole: LazyTensor, parts: Mapping[str, int]) -> Iterator[LazyTensor]:
    leaf, total = key.rpartition(".")[2], sum(parts.values())
    if leaf == "g_idx":  # by input channel, which all parts share
        yield from (whole for _ in parts)
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
    start = 0
    for width in parts.values():
        length = width * stored // total
        yield whole.narrow(axis, start, length)
        start += length


def llama_config(config: dict[str, Any]) -> dict[str, Any]:
    kind = config.get("model_type")
    if kind == "llama":
        return config
    if kind not in AS_LLAMA:
        raise BiasCompensationError(
            f"a model of type {kind!r} cannot be rewritten as a Llama; {sorted(AS_LLAMA)} can."
        )
    obstacle = AS_LLAMA[kind](config)
    if obstacle is not None:
        raise BiasCompensationError(f"this model is not exactly a Llama: {obstacle}.")
    kept = {name: config[name] for name in LLAMA_SETTINGS if name in config}
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **kept}


# What makes a model of another type exactly a Llama with biases. Each answers with what is in the
# way, or None.


def _window_as_llama(config: Mapping[str, Any]) -> str | None:
    window = config.get("sliding_window")
    return None if window is None else f"its attention has a sliding window of {window}"


def _qwen2_as_llama(config: Mapping[str, Any]) -> str | None:
    layers = set(config.get("layer_types") or ())
    if config.get("use_sliding_window") or layers - {"full_attention"}:
        return "its attention has a sliding window"
    return None


def _phi3_as_llama(config: Mapping[str, Any]) -> str | None:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        return f"its rotary embedding is of the kind {kind!r}"
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        return f"only {partial:.0%} of each of its heads are rotated"
    return _window_as_llama(config)


AS_LLAMA: dict[str, Callable[[Mapping[str, Any]], str | None]] = {
    "mistral": _window_as_llama,
    "qwen2": _qwen2_as_llama,
    "phi3": _phi3_as_llama,
}
FUSED: dict[str, Callable[[Mapping[str, Any]], Fused]] = {"phi3": phi3}
# What a Llama's config has of those.
LLAMA_SETTINGS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act"),
    *("max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache"),
    *("pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "attention_dropout"),
    *("rope_theta", "rope_scaling", "rope_parameters", "dtype", "torch_dtype"),
    *("quantization_config", "transformers_version"),
)
