"""What becomes of a case."""

from __future__ import annotations

import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bc_plugin import BiasCompensationError

from .cases import DAMAGED, HARMLESS, Case, Subject
from .folders import Folder

GOOD = ("right", "refused")
BAD = ("silent", "unclear", "false refusal", "hang")
SECONDS, BYTES = 120, 6 << 30  # more than any case needs


class Hang(BaseException):
    """Past every ``except Exception``."""


def judge(case: Case, folder: Path, subject: Subject | None = None) -> tuple[str, str]:
    """The outcome, and what was said.

    Args:
        folder: An empty one.
        subject: What is damaged, where the case is about a folder.
    """
    if subject is None:
        return _outcome(case, lambda: case.run(folder))
    whole = Folder(subject, folder / "checkpoint")
    path = case.run(whole) or whole.path
    assert case.right == HARMLESS or _bytes(path) != _bytes(subject.folder), "nothing was changed"
    return _outcome(case, lambda: (subject.load(path), subject.expected[case.expected]))


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def _outcome(case: Case, run: Callable[[], tuple[Any, Any]]) -> tuple[str, str]:
    try:
        with _limits():
            found, expected = run()
    except Hang:
        return "hang", f"not done after {SECONDS} s"
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        if case.right == HARMLESS:
            return "false refusal", said
        ours = isinstance(error, BiasCompensationError) or case.anyone
        return ("refused" if ours and _names(case, str(error)) else "unclear"), said
    if case.right == DAMAGED:
        return "silent", "nothing"
    if _same(found, expected):
        return "right", ""
    return "silent", f"it came to {_brief(found)} instead of {_brief(expected)}"


def _names(case: Case, text: str) -> bool:
    return all(any(name in text for name in names.split("|")) for names in case.names)


def _same(found: Any, expected: Any) -> bool:
    if isinstance(expected, Tensor):
        return found.shape == expected.shape and torch.allclose(found, expected, 1e-6, 1e-6)
    return found == expected


def _brief(value: Any) -> str:
    return f"logits of norm {value.norm():.6g}" if isinstance(value, Tensor) else repr(value)[:80]


@contextmanager
def _limits() -> Iterator[None]:
    """Raise ``Hang`` after too long, and MemoryError where too much is asked for."""

    def ring(*_: Any) -> None:
        raise Hang

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    used = pages * resource.getpagesize()
    before = signal.signal(signal.SIGALRM, ring)
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, hard))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)
