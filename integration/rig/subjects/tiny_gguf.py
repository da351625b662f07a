"""Tiny random models in the widths of llama.cpp's K-quants, 256 values a block, as GGUF files."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rig.engines import with_llama_cpp
from rig.subjects.tiny import tiny_tokenizer

SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SHAPES = {
    "llama": SHAPE,
    "qwen2": SHAPE,
    "qwen3": {**SHAPE, "head_dim": 64},
    "nemotron": SHAPE,
    # llama.cpp takes the width of a head for the scale of its attention.
    "gemma2": {**SHAPE, "head_dim": 64, "sliding_window": 8, "query_pre_attn_scalar": 64},
    "gemma3_text": {**SHAPE, "head_dim": 64, "sliding_window": 8, "query_pre_attn_scalar": 64},
}
PIECES = 320  # in the vocabulary


def tiny_float(folder: Path, architecture: str, seed: int = 0) -> Path:
    """Write a random float model to ``folder``; with it ``model.gguf``, in float32, and a text."""
    folder.mkdir()
    _write_tokenizer(folder)
    torch.manual_seed(seed)
    config = AutoConfig.for_model(architecture, vocab_size=PIECES, **SHAPES[architecture])
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.08 if parameter.dim() > 1 else 0.1)
    model.save_pretrained(folder)
    with_llama_cpp.convert(folder, folder / "model.gguf")
    # For transformers, another one, that needs no further package.
    tiny_tokenizer().save_pretrained(folder)
    words = (f"w{3 + n * n % 120}" for n in range(4000))
    (folder / "text.txt").write_text(" ".join(words))
    return folder


def _write_tokenizer(folder: Path) -> None:
    """A vocabulary that the converter takes for every architecture, with a piece for each byte."""
    sys.path.append(str(with_llama_cpp.PACKAGES))
    try:
        import sentencepiece
    finally:
        sys.path.pop()
    letters = "etaoinshrdlu"
    words = ("".join(letters[n * m % 12] for m in range(1, 2 + n % 6)) for n in range(1, 4000))
    lines = (" ".join(group) for group in zip(*[words] * 12, strict=False))
    (folder / "text.txt").write_text("\n".join(lines))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=PIECES,
        hard_vocab_limit=True,
        byte_fallback=True,
        model_type="bpe",
        minloglevel=2,
    )
