"""Tiny random models of eleven architectures, and a crude quantizer with a visible mean shift."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 96
ROTARY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
ARCHITECTURES = {
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 32,
    },
    "bloom": {"hidden_size": 32, "n_layer": 3, "n_head": 4},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "gpt_neox": {**ROTARY},
    "llama": {**ROTARY},
    "mistral": {**ROTARY, "sliding_window": None},
    "qwen2": {**ROTARY},
    "qwen3": {**ROTARY, "head_dim": 8},
    "gemma3_text": {**ROTARY, "head_dim": 8, "sliding_window": 8},
    "phi3": {**ROTARY},
    "granite": {**ROTARY, "residual_multiplier": 0.5},
}
# Those that only export knows more about.
EXPORTED = {
    "smollm3": {**ROTARY},
    "starcoder2": {**ROTARY, "use_bias": False},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4},
    "phi": {**ROTARY},
    "gemma": {**ROTARY, "head_dim": 8},
    "olmo": {**ROTARY},
    "cohere": {**ROTARY},
    "stablelm": {**ROTARY},
}


def tiny_model(architecture: str = "llama", seed: int = 0, **changes) -> nn.Module:
    """A random float32 model of a few thousand weights."""
    torch.manual_seed(seed)
    settings = {
        **(ARCHITECTURES | EXPORTED)[architecture],
        "vocab_size": VOCABULARY,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **changes,
    }
    config = AutoConfig.for_model(architecture, **settings)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        # Larger than usual, and biases not zero, so that every part of a block matters.
        if "norm" not in name and "ln" not in name:
            nn.init.normal_(parameter, std=0.3 if parameter.dim() > 1 else 0.1)
    return model


def crudely_quantized(model: nn.Module, step: float = 0.05) -> nn.Module:
    """A copy whose linears and convolutions are rounded down, which shifts their outputs."""
    quantized = copy.deepcopy(model)
    with torch.no_grad():
        for name, module in quantized.named_modules():
            linear = isinstance(module, (nn.Linear, nn.Conv2d)) or type(module).__name__ == "Conv1D"
            if linear and "lm_head" not in name:
                module.weight.copy_((module.weight / step).floor() * step)
    return quantized


def token_batches(
    count: int = 6, length: int = 16, batch: int = 1, seed: int = 0
) -> list[dict[str, torch.Tensor]]:
    """Random sequences."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "input_ids": (
                ids := torch.randint(3, VOCABULARY, (batch, length), generator=generator)
            ),
            "attention_mask": torch.ones_like(ids),
        }
        for _ in range(count)
    ]


class LetterTokenizer:
    """One token for each letter, and nothing around them."""

    all_special_ids = (0, 1, 2)

    def __call__(self, text, return_tensors=None, **kwargs):
        ids = [ord(c) for c in text]
        return {"input_ids": ids if return_tensors is None else torch.tensor([ids])}
