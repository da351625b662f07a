"""Models whose weights accelerate keeps on the CPU or on disk, and lends when they run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from torch import Tensor, nn

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
                raise _not_in_memory(model, f"{path}.{name}")


def stored_value(model: nn.Module, name: str) -> Tensor:
    """A parameter or buffer, read from where accelerate keeps it if it is offloaded.

    Args:
        name: Its path in ``model``.

    Raises:
        BiasCompensationError: it is offloaded by somebody else.
    """
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    tensor = owner._parameters[leaf] if leaf in owner._parameters else owner._buffers[leaf]
    if not tensor.is_meta:
        return tensor.detach()
    while True:  # the hook that lends it may be that of a module around its own
        kept = _kept_elsewhere(model.get_submodule(path))
        relative = name[len(path) + 1 :] if path else name
        with suppress(KeyError):
            if kept is not None:
                return kept[relative].detach()
        if not path:
            raise _not_in_memory(model, name)
        path = path.rpartition(".")[0]


def _kept_elsewhere(module: nn.Module) -> Mapping[str, Tensor] | None:
    hook: Any = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):
        if getattr(one, "weights_map", None) is not None:
            return one.weights_map
    return None


def _not_in_memory(model: nn.Module, name: str) -> BiasCompensationError:
    return BiasCompensationError(
        f"{name} is not in memory: this {type(model).__name__} is offloaded, but its weights have "
        "to be read. Load it in whole, without 'cpu' or 'disk' among several devices in "
        "device_map; it may be offloaded afterwards."
    )
