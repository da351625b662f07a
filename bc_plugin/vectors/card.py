"""The model card of a compensated checkpoint: what it needs, and how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import BiasCompensationError
from ..names import KEY
from .settings import read_settings

CARD = "README.md"
_TEXT = """\
---
library_name: transformers
tags:
- bias_compensation
---

# A quantized model with bias compensation

{quantized} Vectors of the mean shift of its quantization are stored with the
weights (tensors `*.bias_compensation`), and bc_plugin adds them back. {without}

```python
import bc_plugin

bc_plugin.enable()

from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("this-checkpoint")
```

A program that does not know of the plugin is run with it:

```sh
bc-plugin run -- lm_eval --model hf --model_args pretrained=this-checkpoint --tasks wikitext
bc-plugin run -- transformers serve
```
"""
_JOINT = (
    "The weights were quantized jointly with these vectors and are worth nothing by themselves, so "
    "loaders without bc_plugin refuse them, and say that they need it."
)
_ALONE = "Without bc_plugin it loads as the quantized model alone, less accurate."


def _quantized(settings: Mapping[str, Any]) -> str:
    method, bits = settings.get("quant_method"), settings.get("bits")
    how = f" with {str(method).upper()}" if method else ""
    return f"Quantized{how}, {bits} bits." if bits else f"Quantized{how}."


def write_card(folder: str | Path) -> Path:
    """Write a model card into a compensated checkpoint, if it has none.

    Returns:
        The card's path.

    Raises:
        BiasCompensationError: ``folder`` holds no compensated checkpoint.
    """
    path = Path(folder) / CARD
    settings = read_settings(folder)
    entry = settings.get(KEY)
    if entry is None:
        raise BiasCompensationError(
            f"{folder} holds no compensated checkpoint: there is no {KEY} entry in the "
            "quantization_config of a config.json; save the model there first."
        )
    if not path.exists():
        text = _TEXT.format(
            quantized=_quantized(settings),
            without=_JOINT if entry.get("joint") else _ALONE,
        )
        path.write_text(text, encoding="utf-8")
    return path
