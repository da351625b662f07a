"""Patches of toolkits: what they are, and how one is applied and undone."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import wrapt
from packaging.specifiers import SpecifierSet

from ..errors import BiasCompensationError

_ABSENT = object()


def argument(name: str, place: int, args: tuple, kwargs: dict[str, Any]) -> Any:
    """An argument of a wrapped call, whichever way it was passed."""
    return kwargs[name] if name in kwargs else args[place]


@dataclass(frozen=True)
class Patch:
    """One function of a toolkit, wrapped.

    Attributes:
        target: ``"package.module:Class.function"``.
        wrapper: A wrapt wrapper, ``(wrapped, instance, args, kwargs) -> result``.
        parameters: Names the function's signature must have for the wrapper to be right.
    """

    target: str
    wrapper: Callable[..., Any]
    parameters: tuple[str, ...] = ()


@dataclass(frozen=True)
class Toolkit:
    """A toolkit that can be patched.

    Attributes:
        name: What ``enable`` calls it.
        distribution: Its name on the package index.
        versions: Ranges of versions its patches were written for and tested with.
        patches: What to wrap.
        needs: Toolkits that have to be patched along with it, where they are installed.
    """

    name: str
    distribution: str
    versions: tuple[str, ...]
    patches: tuple[Patch, ...]
    needs: tuple[str, ...] = ()

    @property
    def version(self) -> str | None:
        """The installed version, None when it is not installed."""
        try:
            return metadata.version(self.distribution)
        except metadata.PackageNotFoundError:
            return None

    def check_version(self) -> None:
        """Refuse a version that the patches were not written for."""
        works = " or ".join(f'"{self.distribution}{range_}"' for range_ in self.versions)
        advice = f"bias compensation works with {works} (pip install one of them)"
        if self.version is None:
            raise BiasCompensationError(f"{self.distribution} is not installed; {advice}.")
        if not any(
            SpecifierSet(range_).contains(self.version, prereleases=True)
            for range_ in self.versions
        ):
            raise BiasCompensationError(
                f"{self.distribution} {self.version} is not supported; {advice}, or enable other "
                "toolkits by name."
            )


class Applied:
    """A patch in place, with what is needed to take it out again."""

    def __init__(self, toolkit: Toolkit, patch: Patch) -> None:
        module, _, path = patch.target.partition(":")
        try:
            found = wrapt.resolve_path(importlib.import_module(module), path)
        except (ImportError, AttributeError) as error:
            raise BiasCompensationError(
                f"{toolkit.distribution} {toolkit.version} has no {patch.target} ({error}); its "
                "installation differs from the release, reinstall it."
            ) from error
        parent, self.attribute, original = found
        missing = set(patch.parameters) - set(
            inspect.signature(getattr(parent, self.attribute)).parameters
        )
        if missing:
            raise BiasCompensationError(
                f"{patch.target} of {toolkit.distribution} {toolkit.version} has no parameter "
                f"{sorted(missing)}; its installation differs from the release, reinstall it."
            )
        self.parent = parent
        # What stands in the class itself: an inherited function must become inherited again.
        self.before = vars(parent).get(self.attribute, _ABSENT)
        self.wrapped = wrapt.FunctionWrapper(
            original if self.before is _ABSENT else self.before, patch.wrapper
        )

    def apply(self) -> None:
        setattr(self.parent, self.attribute, self.wrapped)

    def undo(self) -> None:
        if self.before is _ABSENT:
            delattr(self.parent, self.attribute)
        else:
            setattr(self.parent, self.attribute, self.before)
