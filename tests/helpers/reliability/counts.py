"""How many cases of each family came to what, printed at the end of a run."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

from .cases import Case, Subject
from .judge import BAD, GOOD, judge

OUTCOMES = (*GOOD, *BAD, "half-written", "left over")
_found: list[tuple[Case, str]] = []


def count(case: Case, outcome: str, said: str) -> None:
    """Keep an outcome for the table, and, where ``RELIABILITY_REPORT`` names a file, in there."""
    _found.append((case, outcome))
    path = os.environ.get("RELIABILITY_REPORT")
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps([case.family, case.name, outcome, said]) + "\n")


def hold(case: Case, folder: Path, subject: Subject | None = None) -> None:
    """Judge a case and count it; a test's assertion."""
    outcome, said = judge(case, folder, subject)
    count(case, outcome, said)
    assert outcome in GOOD, f"{outcome}: {said}"


def table() -> list[str]:
    """A line for each family, and one for all."""
    rows = {family: Counter() for family in dict.fromkeys(case.family for case, _ in _found)}
    for case, outcome in _found:
        rows[case.family][outcome] += 1
    total = Counter(outcome for _, outcome in _found)
    width = max(map(len, rows), default=0)
    head = f"{'':{width}}  cases  " + "  ".join(OUTCOMES)
    lines = [
        f"{family:{width}}  {sum(counts.values()):5}  "
        + "  ".join(f"{counts[outcome]:{len(outcome)}}" for outcome in OUTCOMES)
        for family, counts in {**rows, "all": total}.items()
    ]
    return [head, *lines]


def pytest_terminal_summary(terminalreporter) -> None:
    """For a conftest; however many have it, the table is printed once."""
    if _found:
        terminalreporter.section("reliability")
        for line in table():
            terminalreporter.write_line(line)
        _found.clear()
