"""A case: what is done to a folder that was whole, and what may then become of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HARMLESS, DAMAGED, EITHER = "harmless", "damaged", "either"


@dataclass(frozen=True)
class Case:
    """One input.

    Attributes:
        family, name: Where it is counted, and what it is.
        run: Does it. Where a folder is damaged it gets a ``Folder``, and may return the path to
            load instead; else it gets an empty folder, and returns what came out of it and what
            should have: two equal values, or one tensor each.
        right: ``HARMLESS`` has to go well, ``DAMAGED`` to be refused, ``EITHER`` may do both, so
            long as what comes out is right.
        names: What a refusal says, each: the file, the tensor or the option; ``|`` between several
            that are as good.
        expected: Which of the subject's logits are right.
        anyone: A loader's own error, which comes before ours, is as good if it says the names.
    """

    family: str
    name: str
    run: Callable[[Any], Any]
    right: str = DAMAGED
    names: tuple[str, ...] = ()
    expected: str = "compensated"
    anyone: bool = False

    def __str__(self) -> str:
        return f"{self.family}: {self.name}"


def chosen(cases: Iterable[Case]) -> list[Case]:
    """All with ``RELIABILITY=all``, as in ``make test-reliability``; else one of each family."""
    cases = list(cases)
    assert len({str(case) for case in cases}) == len(cases), "two cases have one name"
    if os.environ.get("RELIABILITY") == "all":
        return cases
    return list({case.family: case for case in reversed(cases)}.values())[::-1]


@dataclass(frozen=True)
class Subject:
    """A folder that is whole, and how it is loaded.

    Attributes:
        folder: Never written to.
        load: From a path to logits.
        expected: Right logits: ``compensated``, and ``plain`` without vectors.
        others: Folders of the same shapes: another run's ``vectors`` for the same weights, another
            calibration's ``weights`` with vectors of their own, another ``model``, and the
            ``float`` model.
    """

    folder: Path
    load: Callable[[Path], Any]
    expected: dict[str, Any]
    others: dict[str, Path]
