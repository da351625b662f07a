"""Tiny random models in the shapes that GPTQ kernels take, and calibration data for them."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 128
ROTARY = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
SHAPES = {
    "llama": ROTARY,
    "qwen2": ROTARY,
    "phi3": ROTARY,
    "mistral": {**ROTARY, "sliding_window": None},
    "qwen3": {**ROTARY, "head_dim": 32},
    "gemma3_text": {**ROTARY, "head_dim": 32, "sliding_window": 16},
    "opt": {
        "hidden_size": 128,
        "ffn_dim": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 128,
        "max_position_embeddings": 64,
    },
}


def tiny_checkpoint(
    folder,
    architecture="llama",
    dtype=torch.float32,
    seed=0,
    vocab_size=VOCABULARY,
    longest=64,
    **changes,
):
    """Write a random float model to ``folder``; returns the folder as a string.

    ``changes`` are of its shape.
    """
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        architecture,
        vocab_size=vocab_size,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **{**SHAPES[architecture], "max_position_embeddings": longest, **changes},
    )
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return str(folder)


def sequences(count=8, length=24, seed=0):
    """Random token sequences, as GPTQ toolkits take them."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "input_ids": (ids := torch.randint(3, VOCABULARY, (1, length), generator=generator)),
            "attention_mask": torch.ones_like(ids),
        }
        for _ in range(count)
    ]


def tiny_tokenizer():
    """Splits at white space; the words are w0 to w127."""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, "w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def text(batches):
    """The sequences as text for that tokenizer."""
    return [" ".join(f"w{token}" for token in batch["input_ids"][0]) for batch in batches]


def tiny_inputs(folder, count):
    """What the command line needs: ``float`` with its tokenizer, and ``text.txt``."""
    tiny_checkpoint(folder / "float")
    tiny_tokenizer().save_pretrained(folder / "float")
    (folder / "text.txt").write_text("\n".join(text(sequences(count))))


@torch.no_grad()
def logits(model, seed=7):
    """Logits on a fixed sequence."""
    return model(**sequences(1, seed=seed)[0]).logits.float()


@torch.no_grad()
def log_probabilities(model, ids):
    """What a model gives the tokens of sequences, (count, length), after their first."""
    scores = model(input_ids=ids).logits.float().log_softmax(-1)
    return scores[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
