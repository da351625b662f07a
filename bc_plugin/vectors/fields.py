"""What the fields of an entry may be; it may come from anywhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..errors import BiasCompensationError
from ..names import KEY

KINDS = ("linear", "block", "convolution")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _are_texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(map(_is_text, value))


def _are_sites(value: Any) -> bool:
    known = isinstance(value, Mapping) and set(value) <= set(KINDS)
    return known and all(map(_are_texts, value.values()))


def _are_rows(value: Any) -> bool:
    rows = isinstance(value, Mapping) and all(isinstance(row, Mapping) for row in value.values())
    return rows and all(isinstance(text, str) for row in value.values() for text in row.values())


FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "positions": ("a number, 0 or more", lambda v: type(v) is int and v >= 0),
    "blocks": (
        "a path, or a list of paths",
        lambda v: _is_text(v) or (_are_texts(v) and bool(v)),
    ),
    "sites": (f"lists of names under any of {', '.join(KINDS)}", _are_sites),
    "joint": ("true or false", lambda v: isinstance(v, bool)),
    "scales": ("true or false", lambda v: isinstance(v, bool)),
    "refined": ("null or an object", lambda v: v is None or isinstance(v, Mapping)),
    "digest": ("a text", _is_text),
    "float_weights": ("a list of texts", _are_texts),
    "errors": ("objects of texts", _are_rows),
    "vectors_digest": ("a text", _is_text),
}


def require_fields(entry: Any, version: int) -> None:
    """Make sure that an entry has all fields, each of its kind.

    Raises:
        BiasCompensationError: it has not, or is of another version of the format.
    """
    if not isinstance(entry, Mapping):
        raise BiasCompensationError(
            f"the {KEY} entry is {entry!r}, expected an object; take it from the original "
            "checkpoint, or compute the compensation again."
        )
    _require_version(entry.get("format_version"), version)
    for name, (expected, fits) in FIELDS.items():
        found = repr(entry[name])[:80] if name in entry else "missing"
        if name not in entry or not fits(entry[name]):
            raise BiasCompensationError(
                f"the {KEY} entry is damaged: its {name} is {found}, expected {expected}; take it "
                "from the original checkpoint, or compute the compensation again."
            )


def _require_version(found: Any, version: int) -> None:
    if type(found) is int and found == 1:
        raise BiasCompensationError(
            f"the {KEY} entry has format version 1, of a development version, in which nothing "
            "binds the vectors to their checkpoint; compute it again with this bc_plugin."
        )
    if type(found) is not int or found != version:
        raise BiasCompensationError(
            f"the {KEY} entry has format version {found!r}; this bc_plugin reads {version}. "
            "Upgrade it, or take the entry from the original checkpoint."
        )
