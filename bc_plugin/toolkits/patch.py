"""Patches of toolkits: what they are, and how one is applied and undone."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import wrapt
from packaging.specifiers import SpecifierSet

from ..errors import BiasCompensationError
from ..supported import Supported

_ABSENT = object()


def argument(name: str, place: int, args: tuple, kwargs: dict[str, Any]) -> Any:
    """An argument of a wrapped call, whichever way it was passed."""
    return kwargs[name] if name in kwargs else args[place]


@dataclass(frozen=True)
class Patch:
    """One function of a toolkit, wrapped.

    Attributes:
        target: ``"package.module:Class.function"``; with ``Class+`` that function of every class in
            the module that is derived from ``Class`` and has its own.
        wrapper: A wrapt wrapper, ``(wrapped, instance, args, kwargs) -> result``.
        parameters: Names the function's signature must have for the wrapper to be right.
        versions: Of the toolkit, where not all that are supported have the function.
    """

    target: str
    wrapper: Callable[..., Any]
    parameters: tuple[str, ...] = ()
    versions: str = ""

    @property
    def module(self) -> str:
        """The module that holds the function."""
        return self.target.partition(":")[0]

    def each(self) -> list[Patch]:
        """The patches that a target with ``Class+`` stands for, or this one; imports the module."""
        path, derived, function = self.target.partition("+.")
        if not derived:
            return [self]
        known = vars(importlib.import_module(self.module))
        base = known.get(path.partition(":")[2])
        classes = [c for c in known.values() if isinstance(c, type) and c is not base]
        return [
            replace(self, target=f"{self.module}:{found.__name__}.{function}")
            for found in dict.fromkeys(classes)
            if base in found.__mro__ and function in vars(found)
        ] or [self]  # which nobody has, so that applying it tells


@dataclass(frozen=True)
class Toolkit:
    """A toolkit that can be patched, in the four places that compensation passes through.

    Attributes:
        name: What ``enable`` calls it.
        supported: The versions its patches were written for and tested with.
        config: Patches by which its config object takes the flag, and keeps it.
        quantizing: Those around its quantization.
        saving: Those by which the vectors get into a checkpoint; none where they do by themselves.
        loading: Those by which they are put in place again.
        needs: Toolkits that have to be patched along with it, where they are installed.
    """

    name: str
    supported: Supported
    config: tuple[Patch, ...] = ()
    quantizing: tuple[Patch, ...] = ()
    saving: tuple[Patch, ...] = ()
    loading: tuple[Patch, ...] = ()
    needs: tuple[str, ...] = ()

    @property
    def patches(self) -> tuple[Patch, ...]:
        """All that there are for the installed version."""
        version = self.supported.version or "0"
        return tuple(
            patch
            for patch in (*self.config, *self.quantizing, *self.saving, *self.loading)
            if SpecifierSet(patch.versions).contains(version, prereleases=True)
        )


class Applied:
    """A patch of an imported toolkit, with what is needed to take it out again.

    Raises:
        BiasCompensationError: there is no such function, or it has other parameters.
    """

    def __init__(self, toolkit: Toolkit, patch: Patch) -> None:
        release = f"{toolkit.supported.distribution} {toolkit.supported.version}"
        module, _, path = patch.target.partition(":")
        try:
            found = wrapt.resolve_path(importlib.import_module(module), path)
        except (ImportError, AttributeError) as error:
            raise BiasCompensationError(
                f"{release} has no {patch.target} ({error}); its installation differs from the "
                "release, reinstall it."
            ) from error
        parent, self.attribute, original = found
        signature = inspect.signature(getattr(parent, self.attribute))
        missing = sorted(set(patch.parameters) - set(signature.parameters))
        if missing:
            raise BiasCompensationError(
                f"{patch.target} of {release} has no parameter {missing}; its installation differs "
                "from the release, reinstall it."
            )
        self.parent = parent
        # What stands in the class itself: an inherited function must become inherited again.
        self.before = vars(parent).get(self.attribute, _ABSENT)
        self.wrapped = wrapt.FunctionWrapper(
            original if self.before is _ABSENT else self.before, patch.wrapper
        )

    def apply(self) -> None:
        """Put the wrapper in the function's place."""
        setattr(self.parent, self.attribute, self.wrapped)

    def undo(self) -> None:
        """Put the function back."""
        if self.before is _ABSENT:
            delattr(self.parent, self.attribute)
        else:
            setattr(self.parent, self.attribute, self.before)
