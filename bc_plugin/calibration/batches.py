"""Calibration data as batches of model inputs, some of them held out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..config import BiasCompensationConfig
from ..errors import BiasCompensationError
from ..models.calls import Batch
from ..ranks import gathered, place_of
from .items import checked_items


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


def _is_sound(item: dict[str, Any]) -> bool:
    return "input_ids" not in item and ("input_features" in item or "input_values" in item)


def _tokens(item: dict[str, Any]) -> int:
    """About how many tokens a model makes of an item."""
    if _is_images(item):  # as if cut into patches of 16 x 16 pixels, as by most models
        count, _, height, width = _first(item).shape
        return count * max(1, height * width // 256)
    if "input_features" in item:  # spectra; Whisper has the frames last, others the bands
        count, *axes = item["input_features"].shape
        return count * max(axes)
    if "input_values" in item and item["input_values"].dim() == 2:  # 320 samples, as in Wav2Vec 2
        count, samples = item["input_values"].shape
        return count * max(1, samples // 320)
    return item.get("input_ids", _first(item)).shape[:2].numel()


def rebatch(items: Iterable[Any], batch_tokens: int) -> list[Batch]:
    """Join items of equal shape into batches of about ``batch_tokens`` tokens.

    Raises:
        BiasCompensationError: an item is none; see ``checked_items``.
    """
    waiting: dict[tuple, list[dict[str, Any]]] = {}
    batches: list[Batch] = []
    for inputs in checked_items(items):
        group = waiting.setdefault(_signature(inputs), [])
        if group and sum(map(_tokens, group)) + _tokens(inputs) > batch_tokens:
            batches.append(_joined(group))
            group.clear()
        group.append(inputs)
    return batches + [_joined(group) for group in waiting.values() if group]


def spread(items: Sequence[Any], max_tokens: int | None) -> list[Any]:
    """Items of about ``max_tokens`` tokens together, taken from all over the data.

    Images and sounds are all used: a class token, or a patch, is seen but once in each. Of several
    ranks each has its part of the data, and takes of it what is taken of the whole, maybe nothing.
    """
    items = list(items)
    inputs = checked_items(items)
    whole = max_tokens is None or any(_is_images(item) or _is_sound(item) for item in inputs)
    if any(gathered(whole)):
        return items
    tokens = sum(gathered(sum(map(_tokens, inputs))))
    start, total = place_of(len(items))
    count = count_used(total, tokens, max_tokens)
    chosen = {i * total // count for i in range(count)}
    return [item for i, item in enumerate(items, start) if i in chosen]


def count_used(total: int, tokens: int, max_tokens: int) -> int:
    """How many of ``total`` items of ``tokens`` tokens together ``spread`` takes; two if it can."""
    return min(total, max(2, math.ceil(total * max_tokens / max(tokens, 1))))


def split_held_out(items: Sequence[Any], share: float) -> tuple[list[Any], list[Any]]:
    """Keep a share of the items apart: every n-th one, so that both parts see all of the data.

    At least one item stays on each side where there are two or more and ``share`` is above 0. Of
    several ranks each has its part of the data, and keeps apart what is of the whole, maybe all.
    """
    items = list(items)
    start, total = place_of(len(items))
    count = count_apart(total, share)
    if count <= 0:
        return items, []
    apart = {(2 * i + 1) * total // (2 * count) - start for i in range(count)}
    kept = [item for i, item in enumerate(items) if i not in apart]
    return kept, [item for i, item in enumerate(items) if i in apart]


def count_apart(total: int, share: float) -> int:
    """How many of ``total`` items ``split_held_out`` keeps apart, if that is above 0."""
    return min(round(total * share) or int(share > 0), total - 1)


def calibration_batches(
    calibration: Iterable[Any], config: BiasCompensationConfig
) -> tuple[list[Batch], list[Batch]]:
    """The calibration data in batches: those that vectors are fitted to, and those held out.

    Raises:
        BiasCompensationError: there is none, or an item is none; see ``checked_items``.
    """
    items = spread(checked_items(calibration), config.token_limit)
    if not any(gathered(bool(items))):
        raise BiasCompensationError("the calibration data is empty; give at least one sequence.")
    fitted, apart = split_held_out(items, config.held_out)
    return rebatch(fitted, config.batch_tokens), rebatch(apart, config.batch_tokens)
