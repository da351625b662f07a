"""Llamas of real shapes with random weights, float and in 4 bits, written block by block."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from rig.quantizers.rounded import gptq_settings, packed
from rig.subjects import real
from rig.subjects.tiny import sequences, text, tiny_tokenizer

GROUP_SIZE = 128
AT_ONCE = 1024  # output features that are packed together, in 64-bit integers
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Shape:
    """Of a Llama; ``layers`` are those of the whole model."""

    hidden: int
    intermediate: int
    heads: int
    key_value_heads: int
    layers: int
    vocabulary: int

    @property
    def has_words(self) -> bool:
        """Whether SmolLM2's tokenizer fits."""
        return self.vocabulary >= 49_152


SHAPES = {
    "8b": Shape(4096, 14336, 32, 8, 32, 128_256),
    "70b": Shape(8192, 28672, 64, 8, 80, 128_256),
    "small": Shape(1024, 2816, 16, 8, 8, 128),
    "tiny": Shape(128, 256, 4, 2, 4, 128),
}


def bytes_of(shape: Shape, layers: int) -> int:
    """About what both checkpoints, and a compensated one beside them, take on a disk."""
    kv = shape.hidden * shape.key_value_heads // shape.heads
    block = shape.hidden * (2 * shape.hidden + 2 * kv + 3 * shape.intermediate)
    return layers * block * 3 + 3 * 2 * 2 * shape.vocabulary * shape.hidden


def write_pair(folder: Path, shape: Shape, layers: int, dtype: torch.dtype) -> tuple[Path, Path]:
    """Write a float model, and what rounding it to nearest gives, a shard for each block.

    Returns:
        The two folders, each with a tokenizer; ``text.txt`` is beside them.
    """
    source, quantized = folder / "float", folder / "quantized"
    for each in (source, quantized):
        each.mkdir(parents=True)
        _write_tokenizer(each, shape)
        config = _config(shape, layers, dtype)
        if each is quantized:
            config["quantization_config"] = gptq_settings(GROUP_SIZE)
        (each / "config.json").write_text(json.dumps(config, indent=2))
    maps: dict[Path, dict[str, str]] = {source: {}, quantized: {}}
    for number, tensors in enumerate(_parts(shape, layers, dtype)):
        name = f"model-{number + 1:05}-of-{layers + 1:05}.safetensors"
        for each, found in ((source, tensors), (quantized, _rounded(tensors))):
            save_file(found, each / name, metadata={"format": "pt"})
            maps[each] |= dict.fromkeys(found, name)
    for each, names in maps.items():
        size = sum(file.stat().st_size for file in each.glob("*.safetensors"))
        index = {"metadata": {"total_size": size}, "weight_map": names}
        (each / INDEX).write_text(json.dumps(index))
    (folder / "text.txt").write_text(_text(shape))
    return source, quantized


def _config(shape: Shape, layers: int, dtype: torch.dtype) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_value_heads,
        "num_hidden_layers": layers,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "dtype": str(dtype).removeprefix("torch."),
    }


def _parts(shape: Shape, layers: int, dtype: torch.dtype) -> Iterator[dict[str, Tensor]]:
    """What is around the blocks, then the tensors of each."""
    generator = torch.Generator().manual_seed(0)

    def drawn(outputs: int, inputs: int, size: float) -> Tensor:
        return (torch.randn(outputs, inputs, generator=generator) * size).to(dtype)

    hidden, wide = shape.hidden, shape.intermediate
    yield {
        "model.embed_tokens.weight": drawn(shape.vocabulary, hidden, 1.0),
        "model.norm.weight": torch.ones(hidden, dtype=dtype),
        "lm_head.weight": drawn(shape.vocabulary, hidden, hidden**-0.5),
    }
    narrow = hidden * shape.key_value_heads // shape.heads
    linears = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (narrow, hidden),
        "self_attn.v_proj": (narrow, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (wide, hidden),
        "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
    }
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        yield {
            f"{prefix}.{path}.weight": drawn(*widths, widths[1] ** -0.5)
            for path, widths in linears.items()
        } | {
            f"{prefix}.{norm}.weight": torch.ones(hidden, dtype=dtype)
            for norm in ("input_layernorm", "post_attention_layernorm")
        }


def _rounded(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, tensor in tensors.items():
        if tensor.dim() == 2 and ".layers." in name:
            found |= _packed(name.removesuffix(".weight"), tensor.half())
        else:
            found[name] = tensor
    return found


def _packed(name: str, weight: Tensor) -> dict[str, Tensor]:
    group_size = min(GROUP_SIZE, weight.shape[1])
    parts = [packed(name, part, group_size, torch.round) for part in weight.split(AT_ONCE)]
    return {
        key: parts[0][key]
        if key.endswith(".g_idx")
        else torch.cat([part[key] for part in parts], 1)
        for key in parts[0]
    }


def _write_tokenizer(folder: Path, shape: Shape) -> None:
    if not shape.has_words:
        tiny_tokenizer().save_pretrained(folder)
        return
    for file in real.smollm2().glob("*token*"):
        shutil.copy(file, folder)


def _text(shape: Shape) -> str:
    return real.wikipedia() if shape.has_words else "\n".join(text(sequences(64, 512)))
