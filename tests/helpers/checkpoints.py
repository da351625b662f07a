"""What the command line needs, in a folder: models, a tokenizer and text."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import bc_plugin

from .language import VOCABULARY, crudely_quantized, tiny_model, token_batches

LENGTH = 16


def write_inputs(folder: Path, sequences: int) -> None:
    """Write ``float``, ``quantized`` (crudely), ``compensated``, and ``text.txt``.

    Args:
        sequences: Of ``LENGTH`` tokens, in the text.
    """
    model = tiny_model()
    quantized = crudely_quantized(model)
    model.save_pretrained(folder / "float")
    quantized.save_pretrained(folder / "quantized")
    bc_plugin.compensate(quantized, model, token_batches()).attach(quantized)
    quantized.save_pretrained(folder / "compensated")
    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(VOCABULARY)}, "w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    for name in ("float", "quantized", "compensated"):
        tokenizer.save_pretrained(folder / name)
    ids = torch.cat([batch["input_ids"][0] for batch in token_batches(sequences, LENGTH, seed=1)])
    (folder / "text.txt").write_text(" ".join(f"w{token}" for token in ids))
