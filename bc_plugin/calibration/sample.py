"""Calibration sequences that the float model itself writes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import BiasCompensationError
from ..models.modules import device_of
from .text import start_of_text


@torch.no_grad()
def sample_from(
    model: Any, tokenizer: Any, length: int, count: int, seed: int = 0, batch: int = 32
) -> list[dict[str, Tensor]]:
    """Calibration sequences without a data set: what the float model itself writes.

    The first token, after what the tokenizer starts every text with, is any token; the others
    follow the model's own distribution, after the data generation of Liu et al. (LLM-QAT, arXiv
    2305.17888).

    Args:
        model: A transformers causal language model.
        tokenizer: Its tokenizer; tells how a text starts, and which tokens do not start one.
        length: Tokens of each sequence.
        batch: Sequences written at a time.

    Returns:
        As ``windows``, on the CPU.

    Raises:
        BiasCompensationError: the sequences are too short for any text.
    """
    start = start_of_text(tokenizer)
    written = length - len(start) - 1
    if written < 1:
        raise BiasCompensationError(
            f"sequences of {length} tokens are too short: the model is to continue the "
            f"{len(start) + 1} that they start with. Use longer ones."
        )
    usable = torch.ones(model.config.vocab_size, dtype=torch.bool)
    usable[[token for token in tokenizer.all_special_ids if token < len(usable)]] = False
    generator = torch.Generator().manual_seed(seed)
    choices = usable.nonzero().squeeze(1)
    first = choices[torch.randint(len(choices), (count, 1), generator=generator)]
    first = torch.cat([torch.tensor([start], dtype=first.dtype).expand(count, -1), first], dim=1)
    rows = []
    with torch.random.fork_rng(), _nothing_but_its_distribution(model):
        torch.manual_seed(seed)
        for ids in tqdm(first.split(batch), desc="Sampling calibration data", leave=False):
            ids = ids.to(device_of(model))
            rows.append(
                model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    top_p=1.0,
                    max_new_tokens=written,
                    min_new_tokens=written,  # no end of text before that
                    pad_token_id=0,
                ).cpu()
            )
    return [
        {"input_ids": row, "attention_mask": torch.ones_like(row)}
        for row in torch.cat(rows).split(1)
    ]


@contextmanager
def _nothing_but_its_distribution(model: Any) -> Iterator[None]:
    """Without what a model's own generation config adds, such as a penalty on repetition.

    ``generate`` takes from there whatever its arguments leave open.
    """
    own = model.generation_config
    try:
        model.generation_config = type(own)(eos_token_id=own.eos_token_id)
        yield
    finally:
        model.generation_config = own
