"""Files of a run of the refinement, with errors that say what to do about them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import BiasCompensationError
from ..files import written_whole


@contextmanager
def written_to(path: Path) -> Iterator[Path]:
    """``written_whole``, with an error that tells what a full disk leaves."""
    try:
        with written_whole(path) as part:
            yield part
    except Exception as error:  # torch and safetensors have errors of their own for a full disk
        raise BiasCompensationError(
            f"{path} cannot be written: {error}. What was written before is whole: mend that, and "
            "the same call goes on from there."
        ) from error


@contextmanager
def reading(path: Path, then: str) -> Iterator[None]:
    """Errors in reading ``path`` say that it is damaged, and what happens once it is deleted."""
    try:
        yield
    except OSError:
        raise  # it names the file, which may be whole
    except Exception as error:  # damaged bytes fail in as many ways as there are readers
        raise BiasCompensationError(
            f"{path} is damaged ({type(error).__name__}: {error}). Delete it; {then}."
        ) from error
