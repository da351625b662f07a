"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from .errors import BiasCompensationError

try:
    import fcntl
except ImportError:  # not on Windows: what a killed run leaves there stays
    fcntl = None

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A name beside ``path`` for a file that takes its place at the end, if nothing went wrong."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        yield part
        _follow_umask(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def check_out(out: Path) -> None:
    """Raises: BiasCompensationError: there is something of that name already."""
    if os.path.lexists(out):
        raise BiasCompensationError(f"{out} exists already; name one that does not.")


@contextmanager
def new_files(out: Path) -> Iterator[Path]:
    """A folder whose files come to lie where ``out`` is to, when all went well, ``out`` the last.

    Raises:
        BiasCompensationError: as ``new_folder``.
    """
    check_out(out)
    folder = out.with_name(f".{out.name}.files")
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed at its very end
    with new_folder(folder) as part:
        yield part
    files = sorted(folder.iterdir(), key=lambda file: file.name == out.name)
    for place in (out.with_name(file.name) for file in files):
        if os.path.lexists(place):
            _keep_beside(folder, out, place)
    for file in files:
        os.replace(file, out.with_name(file.name))
    folder.rmdir()


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into that becomes ``out`` when all went well.

    What earlier runs for the same ``out`` left when they were killed is removed.

    Raises:
        BiasCompensationError: ``out`` exists already, or cannot be made, or the disk is full; or
            it came to be meanwhile, and what was written is kept beside it.
    """
    check_out(out)
    part = out.with_name(f".{out.name}.{secrets.token_hex(4)}.part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(out)
        part.mkdir()
    except OSError as error:
        raise BiasCompensationError(
            f"{out} cannot be made: {error.strerror} ({error.filename}); name a folder in one that "
            "you may write to."
        ) from error
    try:
        with _locked(part) as mine:
            if mine is False or not part.exists():
                raise BiasCompensationError(f"another run is making {out}; wait for that.")
            with _full_disk_named(out):
                yield part
                for file in part.rglob("*"):
                    _follow_umask(file)
            _put_in_place(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _remove_leftovers(out: Path) -> None:
    """Remove what runs that were killed were writing, not what others are."""
    name = re.compile(re.escape(f".{out.name}.") + r"[0-9a-f]{8}\.part")
    for left in filter(lambda path: name.fullmatch(path.name), out.parent.iterdir()):
        with suppress(OSError), _locked(left) as mine:  # or it is gone, or somebody else's
            if mine:
                shutil.rmtree(left)


@contextmanager
def _locked(folder: Path) -> Iterator[bool | None]:
    """Whether a folder is this process's meanwhile; None where folders have no locks.

    A lock ends with its process, however that ends.
    """
    if fcntl is None:
        yield None
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        mine: bool | None = True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            mine = False
        except OSError:  # some network file systems
            mine = None
        yield mine
    finally:
        os.close(handle)


@contextmanager
def _full_disk_named(out: Path) -> Iterator[None]:
    try:
        yield
    except BiasCompensationError:
        raise
    except Exception as error:
        if not _is_full(error):
            raise
        raise BiasCompensationError(
            f"{out} was not written, as a disk is full: {error}. Make room in "
            f"{out.parent.absolute()}, or name a folder on another disk, and run it again."
        ) from error


def _is_full(error: BaseException) -> bool:
    """Whether a full disk, a quota or a limit is behind an error; safetensors only says so."""
    said = any(os.strerror(number) in str(error) for number in FULL)
    cause = error.__cause__
    return said or getattr(error, "errno", None) in FULL or (cause is not None and _is_full(cause))


def _put_in_place(part: Path, out: Path) -> None:
    """Rename a finished folder; over an empty one that would go through in silence."""
    try:
        if not os.path.lexists(out):
            part.rename(out)
            return
    except OSError:
        if not os.path.lexists(out):
            raise
    _keep_beside(part, out, out)


def _keep_beside(part: Path, out: Path, taken: Path) -> NoReturn:
    """Rename a finished folder whose place is taken, or that of a file in it."""
    numbered = (out.with_name(f"{out.name}.{n}") for n in range(1, 1000))
    kept = next(path for path in numbered if not os.path.lexists(path))
    part.rename(kept)
    raise BiasCompensationError(
        f"{taken} has come to exist meanwhile, and was left as it is. What was computed is whole, "
        f"and in {kept}: rename that."
    )


def _follow_umask(path: Path) -> None:
    """Let others read a file as the umask says; safetensors lets nobody."""
    if path.is_file() and not path.is_symlink() and path.stat().st_nlink == 1:
        path.chmod(path.stat().st_mode | (0o666 & ~_umask()))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
