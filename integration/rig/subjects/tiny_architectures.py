"""Tiny random models of every causal language model of transformers."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 96
ARCHITECTURES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
LARGEST = 4_000_000  # parameters
SHARED_CACHE = {
    "num_kv_shared_layers": 2,
    "num_hidden_layers": 5,
    "layer_types": ["full_attention" if i in (1, 4) else "sliding_attention" for i in range(5)],
}
HYBRID = {"layer_types": ["mamba", "attention"] * 2}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
SIDES = {
    f"{side}_{name}": value
    for side in ("encoder", "decoder")
    for name, value in {"layers": 4, "ffn_dim": 48, "attention_heads": 4}.items()
}
QSA = {
    "layer_types": ["linear_attention", "indexed_attention"] * 2,
    **{"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8},
    **{"indexer_budget": 8, "indexer_compress_ratio": 2, "hc_lowrank": 4},
}
DOTS = {
    **{f"swa_{name}": 4 for name in ("num_attention_heads", "num_key_value_heads")},
    **{f"swa_{name}": 8 for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")},
    **{"swa_q_lora_rank": 16, "swa_kv_lora_rank": 16, "swa_head_dim": 16},
    **{"num_key_value_heads": 4, "index_n_heads": 2, "index_head_dim": 16},
    "shared_experts_intermediate_size": 16,
}
ADAPTER = {"adapter_out_dim": 32}
EYE = {
    **dict.fromkeys(("num_hidden_layers", "num_attention_heads"), 2),
    **{"hidden_size": 32, "intermediate_size": 48, "image_size": 16, "patch_size": 8},
}

# A config takes of these what it has.
SIZES = {
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "is_decoder": True,
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "dim_ff"), 48),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    "num_key_value_heads": 2,
    **dict.fromkeys(("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "moe_intermediate_size"), 16),
    "shared_expert_intermediate_size": 16,
    "hidden_size_per_layer_input": 8,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 64),
    **dict.fromkeys(("sliding_window", "attention_window", "rotary_dim"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    "num_experts_per_tok": 2,
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
}

# What these need beside, or instead.
OWN: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_group_size": 2},
    "bamba": {**MAMBA, "attn_layer_indices": [1, 3]},
    "bigbird_pegasus": {"max_position_embeddings": 64, "attention_type": "original_full"},
    "blt": {
        "use_cache": False,
        "encoder_hash_byte_group_vocab": 64,
        "global_config": {"hidden_size": 64},
        **{f"{side}_config": {"hidden_size_global": 64} for side in ("encoder", "decoder")},
    },
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
            for kind in ("sliding_attention", "full_attention")
        },
    },
    "dbrx": {
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 48},
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
    },
    "dots3_note": {
        "text_config": DOTS,
        "vision_config": {**EYE, **ADAPTER, "adapter_in_dim": 32, "mlp_layer_types": ["dense"] * 2},
        "audio_config": {**ADAPTER, "adapter_input_size": 32, "downsample_hidden_size": 8},
    },
    "dots3_note_text": DOTS,
    "fuyu": {"patch_size": 4, "image_size": 16},
    "gemma3": {"vision_config": EYE},
    "gemma3n_text": {**SHARED_CACHE, "laurel_rank": 4, "activation_sparsity_pattern": [0.0] * 5},
    "gemma4": {"text_config": SHARED_CACHE},
    "gemma4_text": SHARED_CACHE,
    "gemma4_unified_text": SHARED_CACHE,
    "gemma4_unified": {
        "text_config": SHARED_CACHE,
        "vision_config": {"mm_embed_dim": 32, "mm_posemb_size": 16, "output_proj_dims": 32},
    },
    "got_ocr2": {"vision_config": {**EYE, "output_channels": 32, "global_attn_indexes": [1]}},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {**MAMBA, **HYBRID, "shared_intermediate_size": 48},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8},
    "kimi_linear": {
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "linear_head_dim": 8,
        "linear_num_heads": 4,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"ffn_hidden_size": 48, "expert_ffn_hidden_size": 16, "moe_topk": 2},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 8},
    "moshi": {"audio_vocab_size": 32},
    "moss_transcribe_diarize": {"audio_config": EYE},
    "phi4_multimodal": {
        "audio_config": {
            **{"num_blocks": 1, "ext_pw_out_channel": 32, "nemo_conv_channels": 32},
            "depthwise_separable_out_channel": 32,
        },
        "vision_config": EYE,
    },
    "qwen4_exp": {"text_config": QSA},
    "qwen4_exp_text": QSA,
    "reformer": {
        "attn_layers": ["local", "lsh"] * 2,
        "axial_pos_embds": False,
        "feed_forward_size": 48,
        "attention_head_size": 8,
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
    },
    "roc_bert": {"pronunciation_embed_dim": 8, "shape_embed_dim": 8, "shape_vocab_size": 90},
    "xmod": {"default_language": "en_XX"},
    "xlstm": {"hidden_size": 64, "qk_dim_factor": 1.0},
    "zamba": {
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "hybrid"],
        "mamba_d_state": 8,
        "num_key_value_heads": 4,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        **{"mamba_d_state": 8, "n_mamba_heads": 8, "num_key_value_heads": 4, "adapter_rank": 4},
        "num_mem_blocks": 1,
    },
    "zaya": {"num_experts_per_tok": 1},
}
# Multi-head latent attention: as many keys as queries.
for _name in (
    *("axk1", "axk2", "bailing_hybrid", "deepseek_v2", "deepseek_v3", "deepseek_v32", "youtu"),
    *("glm4_moe_lite", "glm_moe_dsa", "kimi_linear", "longcat_flash", "minicpm3"),
):
    OWN.setdefault(_name, {})["num_key_value_heads"] = 4
# The decoder of an encoder-decoder by itself.
for _name in (
    *("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp"),
    *("pegasus", "plbart", "whisper"),
):
    OWN.setdefault(_name, {}).update(SIDES)


def _settings(kind: type[PreTrainedConfig]) -> dict[str, Any]:
    known = {field.name for field in fields(kind)} if is_dataclass(kind) else set()
    known |= set(kind.attribute_map)
    own = {name: value for name, value in SIZES.items() if name in known}
    for name, inner in kind.sub_configs.items():
        if inner is AutoConfig:
            own[name] = {"model_type": kind.sub_configs_defaults[name].model_type}
            inner = CONFIG_MAPPING[own[name]["model_type"]]
        own[name] = {**own.get(name, {}), **_settings(inner)}
    return own


def _merged(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    both = dict(settings)
    for name, value in changes.items():
        inner = both.get(name)
        nested = isinstance(inner, dict) and isinstance(value, dict)
        both[name] = _merged(inner, value) if nested else value
    return both


def tiny_model(architecture: str, seed: int = 0) -> nn.Module:
    """A random float32 model with a head.

    Raises:
        ValueError: it would not be small.
    """
    kind = CONFIG_MAPPING[architecture]
    config = kind(**_merged(_settings(kind), OWN.get(architecture, {})))
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size:,} parameters")
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" not in name and parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    return model
