"""Patch installed toolkits, and undo it.

A toolkit is patched once it is imported, module by module, be that before ``enable`` or later;
nobody has to wait for toolkits that are installed and not used.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Container
from types import ModuleType

import wrapt

from .errors import BiasCompensationError
from .toolkits.patch import Applied, Toolkit

_lock = threading.RLock()  # imports may come from any thread
_enabled: dict[str, list[Applied]] = {}
_awaited: set[str] = set()  # modules with a hook; wrapt cannot take one out again


def _toolkits() -> dict[str, Toolkit]:
    from .patches import TOOLKITS

    return {toolkit.name: toolkit for toolkit in TOOLKITS}


def enable(*names: str) -> tuple[str, ...]:
    """Patch installed toolkits so that they know ``bias_compensation``.

    Nothing is imported for it: what is imported later is patched then.

    Args:
        names: Toolkits to patch, e.g. ``"optimum"``; with none, all that are installed.

    Returns:
        The names of all toolkits that are enabled now. Calling again changes nothing.

    Raises:
        BiasCompensationError: a name is unknown, a toolkit is not installed, or of a version that
            is not supported, or differs from its release. Nothing is patched then. A difference in
            what is not imported yet is raised by its import.
    """
    known = _toolkits()
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise BiasCompensationError(f"unknown toolkits {unknown}; known are {sorted(known)}.")
    wanted = list(names) or [n for n, toolkit in known.items() if toolkit.supported.version]
    if not wanted:
        raise BiasCompensationError(
            f"no toolkit is installed that can be patched; known are {sorted(known)}."
        )
    for name in wanted:  # it grows on the way
        wanted += [
            other
            for other in known[name].needs
            if other not in wanted and known[other].supported.version
        ]
    with _lock:
        new = [known[name] for name in wanted if name not in _enabled]
        for toolkit in new:
            toolkit.supported.check()
        imported = sys.modules.keys()
        ready = {toolkit.name: _resolved(toolkit, imported) for toolkit in new}
        for name, patches in ready.items():
            for patch in patches:
                patch.apply()
            _enabled[name] = patches
        for toolkit in new:
            for module in {patch.module for patch in toolkit.patches} - imported:
                if module not in _awaited:
                    _awaited.add(module)
                    wrapt.register_post_import_hook(_is_imported, module)
    return enabled()


def _resolved(toolkit: Toolkit, modules: Container[str]) -> list[Applied]:
    """Those patches of a toolkit that belong into ``modules``."""
    patches = [patch for patch in toolkit.patches if patch.module in modules]
    return [Applied(toolkit, each) for patch in patches for each in patch.each()]


def _is_imported(module: ModuleType) -> None:
    with _lock:
        for name in enabled():
            try:
                patches = _resolved(_toolkits()[name], {module.__name__})
            except BiasCompensationError:
                _undo(name)
                raise
            for patch in patches:
                patch.apply()
            _enabled[name] += patches


def disable() -> None:
    """Undo every patch. Models that are compensated already stay compensated."""
    with _lock:
        for name in reversed(enabled()):
            _undo(name)


def _undo(name: str) -> None:
    for patch in reversed(_enabled.pop(name)):
        patch.undo()


def enabled() -> tuple[str, ...]:
    """The names of the toolkits that are patched, or will be once they are imported."""
    return tuple(_enabled)
