"""Entries that are damaged, and config files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bc_plugin.names import KEY

from .cases import DAMAGED, EITHER, HARMLESS, Case
from .folders import Folder

ENTRY = f"{KEY} entry|config.json|bias_compensation.safetensors"
FIELDS = (
    "format_version",
    "positions",
    "blocks",
    "sites",
    "digest",
    "vectors_digest",
    "errors",
    "joint",
    "refined",
)
# What no field may be. Those that tell and decide nothing may be left out.
WRONG = {"a number": 7, "a text": "?", "a list": [3], "an empty list": [], "an object": {"a": 1}}
TYPES = {"format_version": "a number", "positions": "a number", "blocks": "a text"}
TYPES |= dict.fromkeys(("digest", "vectors_digest"), "a text")
TELLS = ("joint", "refined", "errors")
VALUES: dict[str, tuple[Any, ...]] = {
    "format_version": (0, 1, 3, 99, -1, 2.5, "2", True, None),
    "positions": (0, 2, -1, 10**9, 10**30, "all", "1", 1.5, True, None),
    "blocks": ("", "model", "model.layer", "model.layers.0", ["model.layers", "x"], None),
    "digest": ("", "0" * 32, None),
    "vectors_digest": ("", "0" * 32, None),
    "joint": ("yes", None, 1),
    "refined": ("yes", {"by": "model"}, {"by": 3, "steps": "x"}),
}
LAYERS = "model.layers.[0-1]"
RANGES = (
    "layers.[0-999999999]",
    "layers.[" + ",".join(["0-99999"] * 2000) + "]",
    "layers.[1-0]",
    "layers.[0-]",
    "layers.[-]",
    "layers.[,]",
    "layers.[" + "9" * 5000 + "]",
    "layers.[0-1].[0-1]",
    "layers.[]",
)


def _entry(family: str, what: str, change: Callable[[dict], Any], right: str, *names: str) -> Case:
    def run(folder: Folder) -> None:
        folder.change_entry(change)

    return Case(family, what, run, right, names)


def _without(field: str) -> Callable[[dict], dict]:
    return lambda entry: {name: value for name, value in entry.items() if name != field}


def _with(field: str, value: Any) -> Callable[[dict], dict]:
    return lambda entry: {**entry, field: value}


def _inside(field: str, change: Callable[[Any], Any]) -> Callable[[dict], dict]:
    return lambda entry: {**entry, field: change(entry[field])}


def _errors(column: str, text: str) -> Callable[[dict], dict]:
    def change(errors: dict) -> dict:
        first, *rest = errors
        return {first: {**errors[first], column: text}, **{name: errors[name] for name in rest}}

    return _inside("errors", change)


def _linears(change: Callable[[list], list]) -> Callable[[dict], dict]:
    return _inside("sites", lambda sites: {**sites, "linear": change(sites["linear"])})


def _other_digest(entry: dict) -> dict:
    digest = entry["digest"]
    return {**entry, "digest": digest[:-1] + ("0" if digest[-1] != "0" else "1")}


def _reversed(entry: dict) -> dict:
    return dict(reversed(entry.items()))


def _one_by_one(names: list[str]) -> list[str]:
    return [name.replace("[0-1]", number) for name in names for number in "01"]


SITES = {
    "a group less": _linears(lambda names: names[1:]),
    "a group twice": _linears(lambda names: [*names, names[0]]),
    "a group more": _linears(lambda names: [*names, "model.layers.[0-1].mlp.gate"]),
    "a number more": _inside("sites", lambda s: {**s, "block": ["model.layers.[0-2]"]}),
    "a number less": _inside("sites", lambda s: {**s, "block": ["model.layers.[0-0]"]}),
    "no blocks": _inside("sites", lambda s: {"linear": s["linear"]}),
    "kinds swapped": _inside("sites", lambda s: {"block": s["linear"], "linear": s["block"]}),
    "an unknown kind": _inside("sites", lambda s: {"conv": s["linear"], "block": s["block"]}),
    "convolutions": _inside("sites", lambda s: {"convolution": s["linear"], "block": s["block"]}),
    "names that are numbers": _linears(lambda names: [3]),
    "one text for a list": _linears(lambda names: names[0]),
    **{f"range {text[:24]}": _linears(lambda names, text=text: [*names, text]) for text in RANGES},
}
SAME = ("a group twice", "kinds swapped")  # as other sites, and with the same vectors
ERRORS = {
    "NaN": _errors("after", "nan nan"),
    "infinity": _errors("after", "inf inf"),
    "huge": _errors("before", "1e999 1e999"),
    "a word": _errors("before", "low high"),
    "too few": _errors("before", "0.1"),
    "too many": _errors("before", "0.1 0.2 0.3"),
    "numbers": lambda entry: _errors("before", 0.1)(entry),
    "an unknown column": _errors("twice", "0.1 0.2"),
    "a group less": _inside("errors", lambda e: dict(list(e.items())[1:])),
    "a group more": _inside("errors", lambda e: {**e, "x": next(iter(e.values()))}),
    "a huge range": _inside("errors", lambda e: {**e, RANGES[0]: next(iter(e.values()))}),
    "a row of lists": _inside("errors", lambda e: {name: [1, 2] for name in e}),
}
WHOLE = {"true": True, "a number": 3, "a text": "x", "a list": [], "empty": {}, "missing": None}


def _fields() -> list[Case]:
    """Each field without its value, with a value of a wrong type, with one out of range."""
    cases = []
    for field in FIELDS:
        right = EITHER if field in TELLS else DAMAGED
        said = field.removeprefix("format_")
        cases.append(_entry("entry", f"{field} is missing", _without(field), right, ENTRY, said))
        for what, value in WRONG.items():
            names = (said,) if what == TYPES.get(field) else (ENTRY, said)
            cases.append(
                _entry("entry", f"{field} is {what}", _with(field, value), DAMAGED, *names)
            )
        for value in VALUES.get(field, ()):
            change = _with(field, value)
            cases.append(_entry("entry", f"{field} is {value!r}", change, right, said))
    return cases


CASES = [
    *_fields(),
    _entry("entry", "digest: its last digit is another", _other_digest, DAMAGED, "digest"),
    _entry("entry", "joint: toggled", _inside("joint", lambda joint: not joint), EITHER, ENTRY),
    *(
        _entry("sites of the entry", k, v, EITHER if k in SAME else DAMAGED, f"{ENTRY}|.{KEY}")
        for k, v in SITES.items()
    ),
    *(_entry("errors of the entry", k, v, EITHER, ENTRY) for k, v in ERRORS.items()),
    *(
        _entry("entry as a whole", k, lambda _, v=v: v, DAMAGED, f"{ENTRY}|bias_compensation")
        for k, v in WHOLE.items()
    ),
    _entry("harmless entries", "an unknown field", _with("note", "x"), HARMLESS),
    _entry("harmless entries", "unknown objects", _with("tool", {"a": [1]}), HARMLESS),
    _entry("harmless entries", "fields in another order", _reversed, HARMLESS),
    _entry("harmless entries", "sites one by one", _linears(_one_by_one), HARMLESS),
]
