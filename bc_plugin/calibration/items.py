"""What calibration data may be given as, one item after another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from ..errors import BiasCompensationError

IDS, MASK = "input_ids", "attention_mask"
Item = dict[str, Any]


def vocabulary_of(*models: Any) -> int | None:
    """How many tokens all of these models know; None where they are not called with tokens."""
    known = [size for size in map(_vocabulary, models) if size is not None]
    return min(known, default=None)


def _vocabulary(model: Any) -> int | None:
    if getattr(model, "main_input_name", None) != IDS:
        return None
    try:
        return getattr(model.get_input_embeddings(), "num_embeddings", None)
    except (AttributeError, NotImplementedError):
        return None


def checked_items(items: Iterable[Any], vocabulary: int | None = None) -> list[Item]:
    """Every item as a dict; of a lone tensor, with "" for its key.

    Token ids and masks of a single sequence, of shape (length,), become (1, length).

    Args:
        vocabulary: Of the model that is to be called with them, from ``vocabulary_of``.

    Raises:
        BiasCompensationError: one is no model input, is all padding, or has ids or a mask that no
            model takes; it says which.
    """
    if not isinstance(items, Iterable) or isinstance(items, (str, Mapping)):
        raise BiasCompensationError(
            f"the calibration data is of type {type(items).__name__}; expected a list of model "
            "inputs, e.g. of dicts that a tokenizer returns. For text see "
            "bc_plugin.calibration.windows."
        )
    return [_checked(item, f"calibration item {n}", vocabulary) for n, item in enumerate(items)]


def _checked(item: Any, what: str, vocabulary: int | None) -> Item:
    inputs = _as_mapping(item, what)
    key = "" if vocabulary is not None and "" in inputs else IDS
    ids, mask = inputs.get(key), inputs.get(MASK)
    if isinstance(ids, Tensor):
        if ids.dim() == 1:
            inputs = {k: v[None] if _is_row(v) else v for k, v in inputs.items()}
            ids, mask = inputs[key], inputs.get(MASK)
        _check_ids(ids, what, vocabulary)
        if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape != ids.shape[:2]:
            raise BiasCompensationError(
                f"{what} has an attention_mask of shape {tuple(mask.shape)}; expected that of its "
                f"input_ids, {tuple(ids.shape[:2])}."
            )
    if isinstance(mask, Tensor) and mask.dim() == 2 and not bool(mask.any()):
        raise BiasCompensationError(
            f"{what} is all padding: its attention_mask is zero everywhere."
        )
    return inputs


def _as_mapping(item: Any, what: str) -> Item:
    if isinstance(item, Tensor):
        return {"": item}
    if isinstance(item, Mapping):
        inputs = {key: _as_tensor(value, key, what) for key, value in item.items()}
        if any(isinstance(value, Tensor) for value in inputs.values()):
            return inputs
    raise BiasCompensationError(
        f"{what} is of type {type(item).__name__}; expected a dict of tensors that the model can "
        "be called with, e.g. what a tokenizer returns with "
        'return_tensors="pt", or one tensor. For text see bc_plugin.calibration.windows.'
    )


def _as_tensor(value: Any, key: str, what: str) -> Any:
    """Lists, as tokenizers give them, and arrays; a number or a word stays as it is."""
    if isinstance(value, (Tensor, bool, int, float, str, NoneType)):
        return value
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise BiasCompensationError(
            f"{what}: {key} makes no tensor ({error}); expected numbers, and rows of one length. "
            "Give sequences of different lengths as items of their own, or pad them."
        ) from error


def _is_row(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 1


def _check_ids(ids: Tensor, what: str, vocabulary: int | None) -> None:
    if ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
        raise BiasCompensationError(
            f"{what} has input_ids of type {ids.dtype}; expected whole numbers, torch.int64."
        )
    too_many = vocabulary is not None and ids.dim() > 2
    if ids.dim() == 0 or ids.numel() == 0 or too_many:
        raise BiasCompensationError(
            f"{what} has input_ids of shape {tuple(ids.shape)}; expected (batch, length), with at "
            "least one token."
        )
    if vocabulary is not None and ids.dim() == 2:
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= vocabulary:
            raise BiasCompensationError(
                f"{what} has input_ids from {low} to {high}; expected 0 to {vocabulary - 1}, the "
                "vocabulary of the model (of both, the float and the quantized one, where there "
                "are two). Use the tokenizer that belongs to it."
            )
