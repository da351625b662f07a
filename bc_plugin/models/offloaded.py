"""Models whose weights are kept elsewhere, by accelerate or in files, and lent when they run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

from torch import Tensor, nn

from ..errors import BiasCompensationError
from .modules import stored_tensors


def lent(model: nn.Module, name: str) -> AbstractContextManager[None]:
    """While it lasts a module of a streamed model has its weights; any other has them anyway.

    Args:
        name: Path of a block, or of something within one, whose weights come with the block's.
    """
    for path in outwards(name):
        module = model.get_submodule(path)
        lend = _lend(module)
        if lend is not None:
            return lend(module)
    return nullcontext()


def outwards(path: str) -> Iterator[str]:
    """A module's path, and those of the modules around it, up to the model's own."""
    yield path
    while path:
        path = path.rpartition(".")[0]
        yield path


def _lend(module: nn.Module) -> Callable[[nn.Module], AbstractContextManager[None]] | None:
    """What lends a module its weights for as long as it is told to; accelerate's hooks do not."""
    return getattr(getattr(module, "_hf_hook", None), "lend", None)


def require_in_memory(model: nn.Module, paths: Iterable[str]) -> None:
    """Make sure that the weights of lists of blocks can be read, or are lent.

    Raises:
        BiasCompensationError: some are offloaded.
    """
    for path in paths:
        for block, module in model.get_submodule(path).named_children():
            for name, tensor in stored_tensors(module):
                if tensor.is_meta and _lend(module) is None:
                    raise _not_in_memory(model, f"{path}.{block}.{name}")


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
    for around in outwards(path):  # whose hook lends it
        kept = _kept_elsewhere(model.get_submodule(around))
        relative = name[len(around) + 1 :] if around else name
        with suppress(KeyError):
            if kept is not None:
                return kept[relative].detach()
    raise _not_in_memory(model, name)


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
