"""The entry point that vLLM calls in each of its processes (``vllm.general_plugins``)."""

from __future__ import annotations

import logging

from ..names import KEY

logger = logging.getLogger("vllm.bc_plugin")  # below vLLM's own, whose handlers show it


def register() -> None:
    """Let vLLM ask this package whether a checkpoint is compensated; all others are vLLM's.

    May be called any number of times, in every process.
    """
    try:
        from vllm.model_executor.layers.quantization import register_quantization_config

        from .config import BiasCompensationConfig
    except (ImportError, AttributeError) as error:
        # Whoever serves other checkpoints with that vLLM must not notice.
        logger.warning("bc_plugin does not fit this vLLM, which cannot load %s: %s", KEY, error)
        return
    register_quantization_config(KEY)(BiasCompensationConfig)
