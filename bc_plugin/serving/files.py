"""A checkpoint's files, wherever vLLM has them, and the vectors in them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import BiasCompensationError
from ..names import KEY
from ..toolkits.load import read_compensation
from ..vectors.checkpoint import checkpoint_files
from ..vectors.compensation import Compensation


def read_vectors_of(entry: Mapping[str, Any], folder: Path, bound: bool) -> Compensation:
    """The vectors of a checkpoint.

    Args:
        bound: Whether its weights and settings are to be compared with what they were, too.

    Raises:
        BiasCompensationError: they are damaged or incomplete, or belong to another checkpoint.
    """
    files = checkpoint_files(folder)
    if not files:
        raise BiasCompensationError(
            f"{folder} has a {KEY} entry, but no model.safetensors and no index of several files, "
            "so no vectors; serve the folder they were saved in, with vLLM's default load_format."
        )
    return read_compensation(entry, files, bound)


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
