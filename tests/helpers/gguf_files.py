"""GGUF files of tiny models, as llama.cpp's converter names and orders their tensors."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch
from torch import nn

from helpers.language import tiny_model

# Widths that are multiples of the 32 values in a block of Q4_0 and Q8_0.
SHAPE = {"intermediate_size": 64, "tie_word_embeddings": False}
KINDS = gguf.GGMLQuantizationType


def tiny(architecture: str = "llama", seed: int = 0, **changes) -> nn.Module:
    """A float model whose weights such blocks can hold."""
    return tiny_model(architecture, seed, **SHAPE, **changes)


def write_file(path: Path, model: nn.Module, kind: str = "F32", **metadata) -> Path:
    """Write a Llama or Qwen2, with the weights of its blocks quantized.

    Args:
        kind: Of the weights; F32, or what ``gguf.quants`` quantizes to.
        metadata: Strings and whole numbers that are added; a double underscore is a dot.
    """
    config = model.config
    architecture = config.model_type
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if architecture == "llama":
        writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    for key, value in metadata.items():
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        add(key.replace("__", "."), value)
    (arch,) = (arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        values, (path_of, leaf) = tensor.numpy(), name.rsplit(".", 1)
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        count = heads.get(path_of.rpartition(".")[2])
        if architecture == "llama" and count:
            apart = values.reshape(count, 2, -1, *values.shape[1:])
            values = apart.swapaxes(1, 2).reshape(values.shape)
        quantize = kind != "F32" and ".layers." in name and values.ndim == 2
        kept = KINDS[kind] if quantize else KINDS.F32
        data = gguf.quants.quantize(np.ascontiguousarray(values), kept)
        writer.add_tensor(f"{names.get_name(path_of)}.{leaf}", data, raw_dtype=kept)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def calibration(count: int = 6, length: int = 24, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Random sequences."""
    generator = torch.Generator().manual_seed(seed)
    shape = count, 1, length
    return [{"input_ids": ids} for ids in torch.randint(3, 96, shape, generator=generator)]
