"""Patch installed toolkits, and undo it."""

from __future__ import annotations

from .errors import BiasCompensationError
from .toolkits.patch import Applied, Toolkit

_applied: dict[str, list[Applied]] = {}


def _toolkits() -> dict[str, Toolkit]:
    from .patches import TOOLKITS

    return {toolkit.name: toolkit for toolkit in TOOLKITS}


def enable(*names: str) -> tuple[str, ...]:
    """Patch installed toolkits so that they know ``bias_compensation``.

    Args:
        names: Toolkits to patch, e.g. ``"optimum"``; with none, all that are installed.

    Returns:
        The names of all toolkits that are patched now. Calling again changes nothing.

    Raises:
        BiasCompensationError: a name is unknown, a toolkit is not installed or of a version that
            is not supported. Nothing is patched then.
    """
    known = _toolkits()
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise BiasCompensationError(f"unknown toolkits {unknown}; known are {sorted(known)}.")
    wanted = list(names) or [name for name, toolkit in known.items() if toolkit.version]
    if not wanted:
        raise BiasCompensationError(
            f"no toolkit is installed that can be patched; known are {sorted(known)}."
        )
    for name in wanted:  # it grows on the way
        wanted += [
            other for other in known[name].needs if other not in wanted and known[other].version
        ]
    ready = {}
    for name in wanted:
        if name not in _applied:
            known[name].check_version()
            ready[name] = [Applied(known[name], patch) for patch in known[name].patches]
    for name, patches in ready.items():
        for patch in patches:
            patch.apply()
        _applied[name] = patches
    return enabled()


def disable() -> None:
    """Undo every patch. Models that are compensated already stay compensated."""
    for name in reversed(list(_applied)):
        for patch in reversed(_applied.pop(name)):
            patch.undo()


def enabled() -> tuple[str, ...]:
    """The names of the toolkits that are patched."""
    return tuple(_applied)
