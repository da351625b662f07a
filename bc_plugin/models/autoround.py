"""Whether AutoRound made a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn


def is_autoround(model: nn.Module) -> bool:
    """Whether AutoRound quantized a model, in any of its formats, as far as its config tells."""
    config = getattr(model, "config", None)
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return False
    own = settings if isinstance(settings, Mapping) else vars(settings)
    folder = getattr(config, "_name_or_path", None)
    return _says_so(own) or bool(folder and _says_so(_stored(folder)))


def _says_so(settings: Mapping[str, Any]) -> bool:
    return "autoround_version" in settings or settings.get("provider") == "auto-round"


def _stored(folder: str) -> Mapping[str, Any]:
    """The settings as they were written: other formats' classes keep only what they know."""
    try:
        config = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
        return config["quantization_config"] or {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
