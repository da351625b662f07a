"""What a run of the refinement has reached, on disk."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import BiasCompensationError
from ..ranks import given_by_first, is_first
from .checksums import checksum
from .disk import reading, written_to
from .float_logits import BATCHES

RUN, STATES, FLOAT_LOGITS = "refinement.json", "refinement-*.pt", "float_logits"
RESULT = "result.txt"  # what the training came to, once that is about to be put in place
VERSION = 3  # of these files; 1 and 2 were development versions'
FLOAT_MODEL = "float model"  # its name among the inputs


class Progress:
    """What a run has reached, on disk, for when it is stopped.

    Of several ranks the first reads and writes, and tells the others.

    Args:
        folder: Where to keep it; None to keep nothing.
        settings: How the run was asked for.
        inputs: Fingerprints of what it was given, by what that is.

    Raises:
        BiasCompensationError: the folder holds another run's progress, or is damaged.
    """

    def __init__(
        self,
        folder: Path | None,
        settings: Mapping[str, Any] | None = None,
        inputs: Mapping[str, str] | None = None,
    ) -> None:
        self.folder, self.inputs = folder, dict(inputs or {})
        identity = {"settings": dict(settings or {}), "inputs": self.inputs}
        identity = json.loads(json.dumps(identity))  # as it is read again
        self.run = checksum([VERSION, identity])
        if folder is not None and is_first():
            _require_same_run(folder, identity)

    def read(self, name: str) -> dict[str, Any] | None:
        """What ``write`` wrote last under this name.

        Raises:
            BiasCompensationError: it is damaged, or another run's.
        """
        return given_by_first(self._read(name) if is_first() else None)

    def _read(self, name: str) -> dict[str, Any] | None:
        if self.folder is None:
            return None
        path = self._path(name)
        if not path.is_file():
            return None
        with reading(path, "its training starts anew"):
            kept = torch.load(path, map_location="cpu", weights_only=True)
            if checksum([kept["run"], kept["state"]]) != kept["checksum"]:
                raise ValueError("its checksum is another")
        if kept["run"] != self.run:
            raise _another(self.folder, [f"{path.name} is not of this one"])
        return kept["state"]

    def write(self, name: str, state: dict[str, Any]) -> None:
        """Keep a state, in place of the last one under this name."""
        if self.folder is None or not is_first():
            return
        kept = {"run": self.run, "state": state, "checksum": checksum([self.run, state])}
        with written_to(self._path(name)) as part:
            torch.save(kept, part)

    @property
    def float_logits(self) -> Path:
        """Where to keep what the float model predicts."""
        return self.folder / FLOAT_LOGITS

    def _path(self, name: str) -> Path:
        return self.folder / STATES.replace("*", name)


def about_to_place(folder: Path, vectors: Mapping[str, Tensor]) -> None:
    """Keep which vectors the training in ``folder`` came to."""
    with written_to(folder / RESULT) as part:
        part.write_text(checksum(vectors), encoding="utf-8")


def is_in_place(folder: Path, vectors: Mapping[str, Tensor]) -> bool:
    """Whether these vectors are what the training in ``folder`` came to."""
    path = folder / RESULT
    return path.is_file() and path.read_bytes() == checksum(vectors).encode()


def delete_progress(folder: Path) -> None:
    """Remove what a run kept there, and the folder if nothing else is in it.

    For when its result is in a safe place: the training cannot be had again otherwise.
    """
    logits = folder / FLOAT_LOGITS
    # What tells whose the states are goes after them, and last what tells that they are done with.
    for place, pattern in ((folder, STATES), (logits, BATCHES), (folder, RUN), (folder, RESULT)):
        # Those with a dot were being written when a run was killed.
        for path in (*sorted(place.glob(pattern)), *place.glob(f".{pattern}.*")):
            path.unlink(missing_ok=True)
    for empty in (logits, folder):
        with contextlib.suppress(OSError):
            empty.rmdir()


def _require_same_run(folder: Path, identity: dict[str, Any]) -> None:
    """Keep what identifies this run in a folder, which must hold no other run's progress."""
    path = folder / RUN
    if not (path.is_file() and any(folder.glob(STATES))):  # nothing would be lost
        with written_to(path) as part:
            kept = {"version": VERSION, "run": identity, "checksum": checksum(identity)}
            part.write_text(json.dumps(kept, sort_keys=True), encoding="utf-8")
        return
    with reading(path, "training goes on from the other files"):
        kept = json.loads(path.read_text(encoding="utf-8"))
        version = kept.get("version")
        if version == VERSION and checksum(kept["run"]) != kept["checksum"]:
            raise ValueError("its checksum is another")
    if version != VERSION:
        raise BiasCompensationError(
            f"{path} has version {version!r} of a refinement's progress; this bc_plugin reads "
            f"{VERSION}. Go on with the bc_plugin that wrote it, or delete {folder} to start anew."
        )
    differences = _differences(kept["run"], identity)
    if differences:
        raise _another(folder, differences)


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What is not the same in two runs, in words."""
    found = []
    for name in sorted({*there["settings"], *here["settings"]}):
        was, now = (run["settings"].get(name) for run in (there, here))
        if was != now:
            found.append(f"{name} was {was!r} and is {now!r}")
    for name in sorted({*there["inputs"], *here["inputs"]}):
        if there["inputs"].get(name) != here["inputs"].get(name):
            found.append(f"the {name} differ{'' if name.endswith('s') else 's'}")
    return found


def _another(folder: Path, differences: list[str]) -> BiasCompensationError:
    return BiasCompensationError(
        f"{folder} holds the progress of another refinement ({'; '.join(differences)}). Call it "
        "with what it was started with to go on, or delete it or name another folder."
    )
