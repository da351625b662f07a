"""Whether AutoRound made a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from torch import nn

from ..errors import BiasCompensationError
from ..models.float_blocks import folders_of
from ..vectors.settings import read_settings


def is_autoround(model: nn.Module) -> bool:
    """Whether AutoRound quantized a model, in any of its formats, as far as its config tells."""
    settings = getattr(getattr(model, "config", None), "quantization_config", None) or {}
    if _says_so(settings if isinstance(settings, Mapping) else vars(settings)):
        return True
    # Other formats' classes keep only what they know, and a streamed model has none.
    for folder in folders_of(model):
        with suppress(BiasCompensationError):
            if _says_so(read_settings(folder)):
                return True
    return False


def _says_so(settings: Mapping[str, Any]) -> bool:
    return "autoround_version" in settings or settings.get("provider") == "auto-round"
