"""What is to be remembered of a toolkit's own objects, without an attribute on them.

Plain and global on purpose: toolkits quantize in threads of their own, where context variables are
empty, and put other modules around those that they were given.
"""

from __future__ import annotations

from typing import Any, TypeVar

from torch.utils.weak import WeakIdKeyDictionary

T = TypeVar("T")

_marks: WeakIdKeyDictionary = WeakIdKeyDictionary()  # of the object itself, so long as it lives


def mark(thing: Any, value: Any) -> None:
    """Remember ``value`` of a model, block or weight; one value of each type."""
    _marks.setdefault(thing, {})[type(value)] = value


def mark_of(thing: Any, kind: type[T]) -> T | None:
    """What was remembered of ``thing``, None if nothing of that type was."""
    return _marks.get(thing, {}).get(kind)


def unmark(thing: Any, kind: type[T]) -> T | None:
    """``mark_of``, and forget it."""
    values = _marks.get(thing, {})
    value = values.pop(kind, None)
    if not values:
        _marks.pop(thing, None)
    return value
