"""GPTQ's zero points in files, which have two formats: less one (``gptq``), and as they are.

GPTQModel's kernels want the second, so whoever loads ``gptq`` converts them in memory. Where
transformers saves such a model again it writes them as they are by then, under the label that they
were loaded with, and the next one who loads them is one off.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

LESS_ONE = "gptq"


@contextmanager
def zero_points_as_labelled(model: nn.Module) -> Iterator[None]:
    """While it lasts zero points are in the format that the model's config says."""
    settings = getattr(getattr(model, "config", None), "quantization_config", None)
    converted = _as_they_are(model) if _label(settings) == LESS_ONE else []
    if not converted:
        yield
        return
    from gptqmodel import QuantizeConfig
    from gptqmodel.utils.model import (
        convert_gptq_v1_to_v2_format_module,
        convert_gptq_v2_to_v1_format_module,
    )

    done = []
    try:
        for kernel in converted:
            config = QuantizeConfig(bits=kernel.bits)
            convert_gptq_v2_to_v1_format_module(kernel, config)
            done.append(kernel)
        yield
    finally:
        for kernel in done:
            convert_gptq_v1_to_v2_format_module(kernel, kernel.bits, kernel.pack_dtype)


def _label(settings: Any) -> str | None:
    """GPTQ's format by the config of a model, which may be a dict."""
    if isinstance(settings, dict):
        return settings.get("checkpoint_format", settings.get("format"))
    return getattr(settings, "format", None)


def _as_they_are(model: nn.Module) -> list[Any]:
    """The kernels of GPTQModel that have their zero points as they are."""
    return [
        module
        for module in model.modules()
        if getattr(module, "REQUIRES_FORMAT_V2", False) and module.qzero_format() == 2
    ]
