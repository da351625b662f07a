"""Vectors follow wherever vLLM's loaders have loaded a model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from ..names import KEY
from ..toolkits.flag import is_entry
from .attach import attach

_patched: list[type] = []


def attach_when_loaded() -> None:
    """Follow the loading of models in this process; once, however often it is called."""
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader
    from wrapt import wrap_function_wrapper

    if not _patched:
        _patched.append(BaseModelLoader)
        wrap_function_wrapper(BaseModelLoader, "load_model", _load_model)


def _load_model(wrapped: Any, loader: Any, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    model = wrapped(*args, **kwargs)
    given = inspect.signature(wrapped).bind(*args, **kwargs).arguments
    # A draft's config may be another than the one that its target is loaded with.
    settings = given["model_config"].model_arch_config.quantization_config or {}
    if is_entry(settings.get(KEY)):
        attach(model, settings[KEY], given["vllm_config"], given["model_config"])
    return model
