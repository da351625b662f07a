"""Modules without weights of their own, which are lent to them while they run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.hooks import ModelHook
from torch import Tensor, nn

from ..models.modules import set_tensor
from .tensors import StoredTensors


class Lending(ModelHook):
    """Lends a module its weights while it runs, or for as long as ``lend`` lasts.

    What changes in them while they are lent stays changed.

    Args:
        weights_map: Its parameters and buffers that are in files, by their path in it.
        device: Where it runs.
    """

    def __init__(self, weights_map: StoredTensors, device: torch.device) -> None:
        self.weights_map, self.execution_device = weights_map, device
        self.empty: dict[str, Tensor] = {}
        self.lent = False

    def init_hook(self, module: nn.Module) -> nn.Module:
        """Called by accelerate, with the module on the meta device."""
        tensors = dict(module.named_parameters()) | dict(module.named_buffers())
        self.empty = {name: tensors[name].to("meta") for name in self.weights_map}
        self._give_up(module)
        return module

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
        """Called by accelerate before the module runs."""
        if not self.lent:
            self._fill(module)
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """Called by accelerate when it has run."""
        if not self.lent:
            self._give_up(module)
        return output

    @contextmanager
    def lend(self, module: nn.Module) -> Iterator[None]:
        """While it lasts the module has its weights, however often it runs."""
        if self.lent:
            yield
            return
        given = self._fill(module)
        versions = {name: tensor._version for name, tensor in given.items()}
        self.lent = True
        try:
            yield
        finally:
            self.lent = False
            for name, tensor in given.items():
                if tensor._version != versions[name]:
                    self.weights_map.changed[name] = tensor
            self._give_up(module)

    def _fill(self, module: nn.Module) -> dict[str, Tensor]:
        return {
            name: set_tensor(
                module, name, self.weights_map[name].to(self.execution_device, empty.dtype)
            )
            for name, empty in self.empty.items()
        }

    def _give_up(self, module: nn.Module) -> None:
        for name, empty in self.empty.items():
            set_tensor(module, name, empty)


class RowsLending(Lending):
    """Lends an embedding those of its rows that are looked up; tables are large."""

    def init_hook(self, module: nn.Module) -> nn.Module:
        """Called by accelerate."""
        module.padding_idx = None  # for gradients only, and in another row of what is lent
        return super().init_hook(module)

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
        """Called by accelerate before the embedding is called with its ``input``, token ids."""
        ids = args[0] if args else kwargs["input"]
        rows, places = ids.unique(return_inverse=True)
        table, empty = self.weights_map["weight"], self.empty["weight"]
        lent = table[rows.to(table.device)].to(self.execution_device, empty.dtype)
        set_tensor(module, "weight", lent)
        return (places.to(self.execution_device),), {}
