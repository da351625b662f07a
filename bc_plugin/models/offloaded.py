"""Models whose weights accelerate keeps on the CPU or on disk, and lends when they run."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ..errors import BiasCompensationError
from .modules import stored_tensors


def require_in_memory(model: nn.Module, paths: Iterable[str]) -> None:
    """Make sure that the weights of parts of a model can be read.

    Raises:
        BiasCompensationError: some are offloaded.
    """
    for path in paths:
        for name, tensor in stored_tensors(model.get_submodule(path)):
            if tensor.is_meta:
                raise BiasCompensationError(
                    f"{path}.{name} is not in memory: this {type(model).__name__} is offloaded, "
                    "but its weights have to be read. Load it in whole, without 'cpu' or 'disk' "
                    "among several devices in device_map; it may be offloaded afterwards."
                )
