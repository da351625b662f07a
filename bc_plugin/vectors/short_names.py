"""Site names written short: those that differ only in a number, as one."""

from __future__ import annotations

import re
from collections.abc import Iterable

_NUMBER = re.compile(r"(?<=\.)(\d+)(?=\.|$)")
MOST = 100_000  # names that one range may stand for
_RANGES = re.compile(r"\[([\d,-]+)\]")


def collapse(names: Iterable[str]) -> dict[str, list[str]]:
    """Group names that differ only in their first number, e.g. the block's.

    Returns:
        The short form of each group, such as ``model.layers.[0-29].mlp.down_proj``, and the names
        it stands for, ascending.
    """
    groups: dict[str, dict[int, str]] = {}
    for name in names:
        match = _NUMBER.search(name)
        if match is None:
            groups[name] = {0: name}
        else:
            template = f"{name[: match.start()]}[]{name[match.end() :]}"
            groups.setdefault(template, {})[int(match.group())] = name
    return {
        template.replace("[]", f"[{_ranges(sorted(members))}]"): [
            members[number] for number in sorted(members)
        ]
        for template, members in groups.items()
    }


def expand(short: str) -> list[str]:
    """The names a short form stands for.

    Raises:
        ValueError: it stands for more than any model has, or for none.
    """
    match = _RANGES.search(short)
    if match is None:
        return [short]
    names = []
    for part in match.group(1).split(","):
        first, _, last = part.partition("-")
        numbers = range(int(first), int(last or first) + 1)
        if not 0 < len(numbers) <= MOST - len(names):
            raise ValueError(f"{short[:80]!r} stands for {len(names) + len(numbers)} names")
        for number in numbers:
            names.append(f"{short[: match.start()]}{number}{short[match.end() :]}")
    return names


def _ranges(numbers: list[int]) -> str:
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in parts)
