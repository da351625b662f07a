"""Which linears of an architecture may carry a bias, and which engines read it.

Read in the sources of transformers 5.23, vLLM 0.32 and llama.cpp (as in llama-cpp-python 0.3.36).
An engine that is not listed for an architecture was not looked into, or does not run it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

ENGINES = ("transformers", "vllm", "llama.cpp")
ALWAYS = ""


def _linears(flags: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(linear for linears in flags.values() for linear in linears)


def _plain(config: Mapping[str, Any]) -> float | None:
    return 1.0


@dataclass(frozen=True)
class InGGUF:
    """What llama.cpp asks the GGUF files of an architecture for.

    Attributes:
        biases: Linears whose bias it adds if a file brings one (``TENSOR_NOT_REQUIRED``); a tensor
            that it does not ask for is an error to it.
        last: The one of them whose output goes into the block's output unchanged, if any. Where
            there is none, a control vector reaches the outputs of all blocks but the first.
        permuted: Linears whose output channels the converter orders for llama.cpp's rotary
            embedding, head by head.
    """

    biases: tuple[str, ...]
    last: str | None = None
    permuted: tuple[str, ...] = ()


@dataclass(frozen=True)
class Architecture:
    """Where the blocks of a model type have biases.

    Attributes:
        flags: For each flag of the config, the linears (paths within a block) that have a bias
            when it is set: all of them, so those without a vector need zeros. ``ALWAYS`` for
            linears that have one whatever the config says.
        last: The linear whose output goes into the block's output unchanged but for a factor; None
            where a norm follows, or where it cannot have a bias.
        factor: That factor, from the config; None where it is not unchanged after all.
        engines: Linears whose bias each engine reads.
        gguf: What its GGUF files may hold; None where transformers reads none, or nobody looked.
    """

    flags: Mapping[str, tuple[str, ...]]
    last: str | None
    engines: Mapping[str, tuple[str, ...]]
    factor: Callable[[Mapping[str, Any]], float | None] = _plain
    gguf: InGGUF | None = None

    @property
    def linears(self) -> tuple[str, ...]:
        """All linears that can have a bias."""
        return _linears(self.flags)


def _known(
    flags: Mapping[str, tuple[str, ...]],
    last: str | None,
    factor: Callable[[Mapping[str, Any]], float | None] = _plain,
    gguf: InGGUF | None = None,
    **engines: tuple[str, ...],
) -> Architecture:
    """transformers reads every bias it has a flag for."""
    return Architecture(flags, last, {"transformers": _linears(flags), **engines}, factor, gguf)


def _granite_factor(config: Mapping[str, Any]) -> float | None:
    return config.get("residual_multiplier", 1.0)


def _opt_factor(config: Mapping[str, Any]) -> float | None:
    return 1.0 if config.get("do_layer_norm_before", True) else None


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_QKVO = (*_QKV, "self_attn.o_proj")
_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_LLAMA = {"attention_bias": _QKVO, "mlp_bias": _MLP}
_OPT = (*_QKV, "self_attn.out_proj", "fc1", "fc2")
_PHI = (*_QKV, "self_attn.dense", "mlp.fc1", "mlp.fc2")
_STARCODER = (*_QKVO, "mlp.c_fc", "mlp.c_proj")
_GPT2 = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
_NEOX_MLP = ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
_NEOX_ATTENTION = ("attention.query_key_value", "attention.dense")
_BLOOM = ("self_attention.query_key_value", "self_attention.dense", *_NEOX_MLP)
# llama.cpp's create_tensor_qkv asks for these in any architecture that builds q, k and v by it.
_IN_GGUF = InGGUF(_QKV)
_LLAMA_IN_GGUF = InGGUF((*_QKVO, *_MLP), last="mlp.down_proj", permuted=_QKV[:2])

ARCHITECTURES: dict[str, Architecture] = {
    "llama": _known(
        _LLAMA,
        "mlp.down_proj",
        gguf=_LLAMA_IN_GGUF,
        vllm=(*_QKVO, *_MLP),
        **{"llama.cpp": (*_QKVO, *_MLP)},
    ),
    "granite": _known(_LLAMA, "mlp.down_proj", _granite_factor, vllm=(*_QKVO, *_MLP)),
    "smollm3": _known(_LLAMA, "mlp.down_proj"),
    "nemotron": _known(
        {"attention_bias": _QKVO, "mlp_bias": _MLP[1:]},
        "mlp.down_proj",
        gguf=InGGUF((*_QKVO, *_MLP[1:]), last="mlp.down_proj"),
    ),
    "starcoder2": _known({"use_bias": _STARCODER}, "mlp.c_proj"),
    "falcon": _known({"bias": _BLOOM}, "mlp.dense_4h_to_h", vllm=_BLOOM),
    "opt": _known({"enable_bias": _OPT}, "fc2", _opt_factor, vllm=_OPT),
    "bloom": _known({ALWAYS: _BLOOM}, "mlp.dense_4h_to_h", vllm=_BLOOM),
    "gpt2": _known({ALWAYS: _GPT2}, "mlp.c_proj", vllm=_GPT2),
    "phi": _known({ALWAYS: _PHI}, "mlp.fc2"),
    "gpt_neox": _known({"attention_bias": _NEOX_ATTENTION, ALWAYS: _NEOX_MLP}, "mlp.dense_4h_to_h"),
    "qwen2": _known({ALWAYS: _QKV}, None, gguf=_IN_GGUF, vllm=_QKV),
    "qwen3": _known({"attention_bias": _QKVO}, None, gguf=_IN_GGUF, vllm=_QKV),
    "gemma": _known({"attention_bias": _QKVO}, None, vllm=()),
    "gemma3_text": _known({"attention_bias": _QKVO}, None, gguf=_IN_GGUF, vllm=_QKVO),
    "gemma2": _known({"attention_bias": _QKVO}, None, gguf=_IN_GGUF),
    "olmo": _known({"attention_bias": _QKVO}, None),
    "cohere": _known({"attention_bias": _QKVO}, "self_attn.o_proj", vllm=()),
    "stablelm": _known({"use_qkv_bias": _QKV}, None, vllm=_QKV),
    "mistral": _known({}, None, vllm=()),
    "mixtral": _known({}, None, vllm=()),
    "phi3": _known({}, None, vllm=()),
}
