"""From arguments to models, tokenizers, settings and calibration data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def pass_settings(positions: str, sites: str, scales: bool) -> dict[str, Any]:
    count = int(positions) if positions.isdecimal() else positions
    return {"positions": count, "sites": sites.replace(",", " ").split(), "scales": scales}


def load_model(folder: str, dtype: str, device_map: str, **kwargs: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, device_map=device_map, **kwargs
    ).eval()


def load_tokenizer(folder: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def calibration_data(
    dataset: str, tokenizer: Any, length: int, samples: int, float_model: Callable[[], Any]
) -> list[dict[str, Any]]:
    from ..calibration.sample import sample_from
    from ..calibration.text import read_text, windows

    if dataset == "self":
        return sample_from(float_model(), tokenizer, length, samples)
    return windows(read_text(dataset), tokenizer, length, samples)
