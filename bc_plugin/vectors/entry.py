"""The ``bias_compensation`` entry of a checkpoint's quantization config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..names import KEY
from .short_names import expand

FORMAT_VERSION = 1


@dataclass(frozen=True)
class SiteErrors:
    """Mean squared error of one site's output, per value, against the float model.

    Attributes:
        kind: ``"linear"``, ``"block"`` or ``"convolution"``.
        before, after: Without and with its vectors, on the tokens they were fitted to.
        held_out_before, held_out_after: The same on tokens kept apart; None where none were.
    """

    kind: str
    before: float
    after: float
    held_out_before: float | None = None
    held_out_after: float | None = None


def written_number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def read_errors(groups: Mapping[str, Mapping[str, str]], kinds: Mapping[str, str]):
    errors = {}
    for short, columns in groups.items():
        rows = zip(*(text.split() for text in columns.values()), strict=True)
        for name, row in zip(expand(short), rows, strict=True):
            values = [None if text == "-" else float(text) for text in row]
            errors[name] = SiteErrors(kinds[name], **dict(zip(columns, values, strict=True)))
    return errors


def set_entry(model: nn.Module, entry: dict[str, Any] | None) -> None:
    """Keep the model's quantization config in step, since saving the model writes it."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if config is None:
        return
    values = config if isinstance(config, dict) else vars(config)
    if entry is None:
        values.pop(KEY, None)
    else:
        values[KEY] = entry
