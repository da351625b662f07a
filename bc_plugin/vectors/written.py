"""The entry put into a checkpoint that has been written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..files import written_whole
from ..names import KEY
from .checkpoint import bound_to
from .sealed import seal, unseal
from .settings import CONFIG, SETTINGS, read_json


def write_entry(folder: Path, entry: dict[str, Any]) -> None:
    """Put the entry into the settings of a checkpoint, bound to those and to its weights."""
    entry = bound_to(folder, entry)
    for name in (CONFIG, SETTINGS):
        path = folder / name
        if not path.is_file():
            continue
        content = read_json(path)
        settings = content.get("quantization_config", content) if name == CONFIG else content
        if settings is not content:
            content.pop(KEY, None)  # it stood there while the model in memory had no settings
        sealed = seal({**unseal(settings), KEY: entry})
        settings.clear()
        settings.update(sealed)
        with written_whole(path) as part:
            part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
