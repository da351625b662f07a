"""Vectors read and put in place once vLLM has loaded a model, in each process that has a part."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import BiasCompensationError
from ..names import KEY
from ..vectors.checkpoint import checkpoint_files, naming, read_vectors, require_bound
from ..vectors.compensation import Compensation

_patched: list[type] = []


def attach_when_loaded() -> None:
    """Follow the loading of models in this process; once, whenever it is called."""
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader
    from wrapt import wrap_function_wrapper

    if not _patched:
        _patched.append(BaseModelLoader)
        wrap_function_wrapper(BaseModelLoader, "load_model", _load_model)


def _load_model(wrapped: Any, loader: Any, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    model = wrapped(*args, **kwargs)
    given = inspect.signature(wrapped).bind(*args, **kwargs).arguments
    settings = given["model_config"].model_arch_config.quantization_config
    if settings is not None and settings.get(KEY) is not None:
        from .attach import attach

        attach(model, settings[KEY], given["vllm_config"], given["model_config"])
    return model


def read_compensation(entry: Mapping[str, Any], folder: Path, whole: bool) -> Compensation:
    """The vectors of a checkpoint.

    Args:
        whole: Whether its weights and settings are to be compared with what they were, too.

    Raises:
        BiasCompensationError: they are damaged or incomplete, or belong to another checkpoint.
    """
    files = checkpoint_files(folder)
    if not files:
        raise BiasCompensationError(
            f"{folder} has a {KEY} entry, but no model.safetensors and no index of several files, "
            "so no vectors; serve the folder they were saved in, with vLLM's default load_format."
        )
    vectors = read_vectors(files)
    with naming(files):
        compensation = Compensation.from_entry(entry, vectors)
    if whole:
        require_bound(entry, files)
    return compensation


def folder_of(model_config: Any, load_config: Any) -> Path:
    """Where a model's files are; one named as on the hub was downloaded by vLLM before."""
    path = Path(model_config.model)
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            model_config.model,
            revision=model_config.revision,
            cache_dir=load_config.download_dir,
            allow_patterns=["*.safetensors", "*.json"],
        )
    )
