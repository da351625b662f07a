"""Files of a run of the refinement, with errors that say what to do about them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import BiasCompensationError
from ..files import written_whole

WHOLE = "What was written before is whole"


@contextmanager
def writing(path: Path, kept: str = WHOLE) -> Iterator[None]:
    """Errors in writing ``path``, a full disk above all, say what there is to go on from."""
    try:
        yield
    except BiasCompensationError:
        raise
    except Exception as error:  # torch and safetensors have errors of their own for a full disk
        raise BiasCompensationError(
            f"{path} cannot be written: {error}. {kept}: mend that (is {path.parent} full?), and "
            "the same call goes on from there."
        ) from error


@contextmanager
def written_to(path: Path) -> Iterator[Path]:
    """``written_whole``, with an error that tells what a full disk leaves."""
    with writing(path), written_whole(path) as part:
        yield part


@contextmanager
def reading(path: Path, then: str) -> Iterator[None]:
    """Errors in reading ``path`` say that it is damaged, and what happens once it is deleted."""
    try:
        yield
    except OSError as error:  # it may be whole
        raise BiasCompensationError(
            f"{path} cannot be read: {error}. Mend that, and the same call goes on from there; or "
            f"delete it, and {then}."
        ) from error
    except Exception as error:  # damaged bytes fail in as many ways as there are readers
        # Which is not repeated here: torch's advice is to trust the file.
        raise BiasCompensationError(f"{path} is damaged. Delete it, and {then}.") from error
