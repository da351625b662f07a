"""Calibration data: from text to batches of model inputs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..config import BiasCompensationConfig
from ..errors import BiasCompensationError
from ..models.blocks import device_of
from ..models.calls import Batch

NAMED = {
    # The data sets GPTQ toolkits know by name; (repository, configuration, split, column).
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "train", "text"),
    "c4": ("allenai/c4", "en", "train", "text"),
}


def read_text(source: str) -> str:
    """The text of a data set: a ``.txt`` or ``.jsonl`` file (field "text"), or a name.

    Raises:
        BiasCompensationError: there is neither such a file nor such a name.
    """
    path = Path(source)
    if path.is_file():
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            return "\n\n".join(json.loads(line)["text"] for line in text.splitlines() if line)
        return text
    if source not in NAMED:
        raise BiasCompensationError(
            f"dataset {source!r} is neither a file nor one of {sorted(NAMED)}; "
            "pass the path of a .txt or .jsonl file. (Calibration data, though not what a model is "
            'evaluated on, may also be "self".)'
        )
    from datasets import load_dataset

    repository, name, split, column = NAMED[source]
    rows = load_dataset(repository, name, split=split, streaming=True)
    return "\n\n".join(row[column] for row in rows.take(20_000))


def windows(
    text: str, tokenizer: Any, length: int, count: int | None = None, skip: int = 0
) -> list[dict[str, Tensor]]:
    """Cut ``text`` into consecutive windows of ``length`` tokens.

    Args:
        tokenizer: A transformers tokenizer.
        count: At most so many windows; None for all.
        skip: Windows to leave out at the start.

    Returns:
        One ``{"input_ids", "attention_mask"}`` per window, each int64 of shape (1, length).

    Raises:
        BiasCompensationError: the text is shorter than one window.
    """
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
    rows = ids[: len(ids) // length * length].view(-1, 1, length)[skip:][:count]
    if len(rows) == 0:
        raise BiasCompensationError(
            f"the text has {len(ids)} tokens; {skip} windows to skip and one to keep need "
            f"{(skip + 1) * length}. Use a longer text or shorter windows."
        )
    return [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]


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


def _as_mapping(item: Any, number: int) -> dict[str, Any]:
    if isinstance(item, Tensor):
        return {"": item}
    if isinstance(item, Mapping) and any(isinstance(v, Tensor) for v in item.values()):
        return dict(item)
    if isinstance(item, Mapping) and {"input_ids"} <= set(item):  # lists, as tokenizers give them
        return {key: torch.atleast_2d(torch.as_tensor(value)) for key, value in item.items()}
    raise BiasCompensationError(
        f"calibration item {number} is of type {type(item).__name__}; expected a dict of tensors "
        "that the model can be called with, e.g. what a tokenizer returns with "
        'return_tensors="pt", or one tensor. For text see bc_plugin.calibration.windows.'
    )


def _check_mask(item: dict[str, Any], number: int) -> None:
    mask = item.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2 and not bool(mask.any()):
        raise BiasCompensationError(
            f"calibration item {number} is all padding: its attention_mask is zero everywhere."
        )


def _signature(item: dict[str, Any]) -> tuple:
    return tuple(
        (key, tuple(value.shape[1:]), value.dtype) if isinstance(value, Tensor) else (key, value)
        for key, value in sorted(item.items())
    )


def _joined(items: list[dict[str, Any]]) -> Batch:
    first = items[0]
    if list(first) == [""]:
        return torch.cat([item[""] for item in items])
    return {
        key: torch.cat([item[key] for item in items]) if isinstance(value, Tensor) else value
        for key, value in first.items()
    }


def _first(item: dict[str, Any]) -> Tensor:
    return next(value for value in item.values() if isinstance(value, Tensor))


def _is_images(item: dict[str, Any]) -> bool:
    return "input_ids" not in item and _first(item).dim() == 4


def _tokens(item: dict[str, Any]) -> int:
    if _is_images(item):  # as if cut into patches of 16 x 16 pixels, as by most models
        count, _, height, width = _first(item).shape
        return count * max(1, height * width // 256)
    return _first(item).shape[:2].numel()


def rebatch(items: Iterable[Any], batch_tokens: int) -> list[Batch]:
    """Join items of equal shape into batches of about ``batch_tokens`` tokens.

    Raises:
        BiasCompensationError: there are no items, or one is not a model input or all padding.
    """
    waiting: dict[tuple, list[dict[str, Any]]] = {}
    batches: list[Batch] = []
    for number, item in enumerate(items):
        inputs = _as_mapping(item, number)
        _check_mask(inputs, number)
        group = waiting.setdefault(_signature(inputs), [])
        if group and sum(map(_tokens, group)) + _tokens(inputs) > batch_tokens:
            batches.append(_joined(group))
            group.clear()
        group.append(inputs)
    batches += [_joined(group) for group in waiting.values() if group]
    if not batches:
        raise BiasCompensationError("the calibration data is empty; give at least one sequence.")
    return batches


def spread(items: Sequence[Any], max_tokens: int | None) -> list[Any]:
    """Items of about ``max_tokens`` tokens together, taken from all over the data; all images."""
    items = list(items)
    inputs = [_as_mapping(item, number) for number, item in enumerate(items)]
    if max_tokens is None or any(map(_is_images, inputs)):
        return items
    tokens = sum(map(_tokens, inputs))
    count = min(len(items), max(2, math.ceil(len(items) * max_tokens / max(tokens, 1))))
    return [items[i * len(items) // count] for i in range(count)]


def split_held_out(items: Sequence[Any], share: float) -> tuple[list[Any], list[Any]]:
    """Keep a share of the items apart: every n-th one, so that both parts see all of the data.

    At least one item stays on each side where there are two or more and ``share`` is above 0.
    """
    items = list(items)
    count = min(round(len(items) * share) or (share > 0), len(items) - 1)
    if count <= 0:
        return items, []
    apart = {(2 * i + 1) * len(items) // (2 * count) for i in range(count)}
    kept = [item for i, item in enumerate(items) if i not in apart]
    return kept, [items[i] for i in sorted(apart)]


def calibration_batches(
    calibration: Iterable[Any], config: BiasCompensationConfig
) -> tuple[list[Batch], list[Batch]]:
    """The calibration data in batches: those that vectors are fitted to, and those held out."""
    items = spread(list(calibration), config.max_tokens)
    fitted, apart = split_held_out(items, config.held_out)
    return (
        rebatch(fitted, config.batch_tokens),
        rebatch(apart, config.batch_tokens) if apart else [],
    )
