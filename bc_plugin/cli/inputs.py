"""From arguments to models, tokenizers, settings and calibration data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def pass_settings(positions: str, sites: str) -> dict[str, Any]:
    count = int(positions) if positions.isdecimal() else positions
    return {"positions": count, "sites": sites.replace(",", " ").split()}


def load_model(folder: str, dtype: str, device_map: str, **kwargs: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, device_map=device_map, **kwargs
    ).eval()


def load_as_stored(folder: str, dtype: str, device_map: str) -> Any:
    """A quantized model whose weights are known as its files have them, whatever kernels do."""
    from ..toolkits.load import keeping_weights

    with keeping_weights():
        return load_model(folder, dtype, device_map)


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
