"""From vectors to a folder that can be loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def write(quantized: str, out: Path, compensation: Any, model: Any, tokenizer: Any) -> None:
    """A quantized checkpoint's own files, with vectors and a tokenizer.

    Args:
        quantized: Folder, or a name on the hub, whose files are in the cache by now.
        model: What was loaded from it.
    """
    from transformers.utils import cached_file

    from ..toolkits.copy import copy_compensated

    source = Path(quantized)
    if not source.is_dir():
        source = Path(cached_file(quantized, "config.json")).parent
    copy_compensated(source, out, compensation, model)
    if not any(out.glob("tokenizer*")):
        tokenizer.save_pretrained(out)
