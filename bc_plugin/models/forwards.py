"""Something in place of a module's forward, until it is taken out again."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

REPLICATE = "_replicate_for_data_parallel"
SLOT = "_replaced_forward_"


class BoundForward:
    """A function bound to a module, as a method is; a method could not be pickled with its module.

    Whoever wraps a forward (compressed-tensors) calls ``__func__`` with the module.
    """

    def __init__(self, slot: str, module: nn.Module) -> None:
        self.slot = slot
        self.__self__ = module

    @property
    def __func__(self) -> Callable[..., Any]:
        slot = self.slot
        return lambda module, *args, **kwargs: vars(module)[slot].run(module, *args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(type(self.__self__).forward.__get__(self.__self__))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.__self__
        return vars(module)[self.slot].run(module, *args, **kwargs)


class BoundReplicate:
    """Makes DataParallel's replica of a module, whose forward is bound to the replica.

    A replica is a shallow copy: what stands in its forward's place would run the original.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self) -> nn.Module:
        replica = getattr(type(self.module), REPLICATE)(self.module)
        own = vars(replica)
        own[REPLICATE] = BoundReplicate(replica)
        if isinstance(own.get("forward"), BoundForward):
            own["forward"] = BoundForward(own["forward"].slot, replica)
        return replica


class ReplacedForward:
    """Something in place of a module's forward, until ``undo``.

    Rather than a hook: hooks take PyTorch's slow path, which costs more than adding a vector when
    single tokens are decoded, and run in an order of their own.

    It does not hold the module, which it is given at each call: a copy or a replica of the module
    has it, too, and so has whoever wraps the forward of the module.
    """

    def __init__(self, module: nn.Module) -> None:
        own = vars(module)
        number = sum(name.startswith(SLOT) for name in own)
        self.slot = f"{SLOT}{number}"
        self.before = own.get("forward")  # accelerate puts one there, too
        self.was_bound = getattr(self.before, "__self__", None) is module
        self.undone = False
        own[self.slot] = self
        own["forward"] = BoundForward(self.slot, module)
        own.setdefault(REPLICATE, BoundReplicate(module))

    def plain(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """What the forward gives that was there before."""
        before = self.before
        if before is None:
            return type(module).forward(module, *args, **kwargs)
        if isinstance(before, BoundForward):
            return vars(module)[before.slot].run(module, *args, **kwargs)
        return (
            before.__func__(module, *args, **kwargs) if self.was_bound else before(*args, **kwargs)
        )

    def run(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """What is called in the forward's place."""
        raise NotImplementedError

    def undo(self, module: nn.Module) -> None:
        """Give the module the forward back that was there before."""
        own = vars(module)
        current = own.get("forward")
        if not isinstance(current, BoundForward) or current.slot != self.slot:
            self.undone = True  # something else has wrapped it since and holds on to it
            return
        del own["forward"], own[self.slot]
        if self.before is not None:
            own["forward"] = self.before
        if not any(name.startswith(SLOT) for name in own):
            del own[REPLICATE]
