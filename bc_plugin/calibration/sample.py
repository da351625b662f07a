"""Calibration sequences that the float model itself writes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..models.modules import device_of


@torch.no_grad()
def sample_from(
    model: Any, tokenizer: Any, length: int, count: int, seed: int = 0, batch: int = 32
) -> list[dict[str, Tensor]]:
    """Calibration sequences without a data set: what the float model itself writes.

    The first token is any token, the others follow the model's own distribution, after the data
    generation of Liu et al. (LLM-QAT, arXiv 2305.17888).

    Args:
        model: A transformers causal language model.
        tokenizer: Its tokenizer; tells which tokens do not start a text.
        batch: Sequences written at a time.

    Returns:
        As ``windows``, on the CPU.
    """
    usable = torch.ones(model.config.vocab_size, dtype=torch.bool)
    usable[list(tokenizer.all_special_ids)] = False
    generator = torch.Generator().manual_seed(seed)
    choices = usable.nonzero().squeeze(1)
    first = choices[torch.randint(len(choices), (count, 1), generator=generator)]
    rows = []
    with torch.random.fork_rng():
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
                    max_new_tokens=length - 1,
                    min_new_tokens=length - 1,  # no end of text before that
                    pad_token_id=0,
                ).cpu()
            )
    return [
        {"input_ids": row, "attention_mask": torch.ones_like(row)}
        for row in torch.cat(rows).split(1)
    ]
