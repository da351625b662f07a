"""What a run of the refinement has reached, on disk."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import BiasCompensationError
from ..files import written_whole

RUN, STATE = "refinement.json", "refinement-"


class Progress:
    """What a run has reached, on disk, for when it is stopped.

    Args:
        folder: Where to keep it; None to keep nothing.
        identity: Whatever makes this run another one than those before.

    Raises:
        BiasCompensationError: the folder holds another run's progress.
    """

    def __init__(self, folder: Path | None, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        if folder is None:
            return
        text = json.dumps(identity, sort_keys=True)
        path = folder / RUN
        if path.is_file() and path.read_text(encoding="utf-8") != text:
            raise BiasCompensationError(
                f"{folder} holds the progress of a refinement of another checkpoint, on other data "
                "or with other settings; delete it or name another folder."
            )
        with written_whole(path) as part:
            part.write_text(text, encoding="utf-8")

    @property
    def float_logits(self) -> Path:
        """Where to keep what the float model predicts."""
        return self.folder / "float_logits"

    def _path(self, name: str) -> Path:
        return self.folder / f"{STATE}{name}.pt"

    def read(self, name: str) -> dict[str, Any] | None:
        """What ``write`` wrote last under this name."""
        if self.folder is None or not self._path(name).is_file():
            return None
        return torch.load(self._path(name), weights_only=True)

    def write(self, name: str, state: dict[str, Any]) -> None:
        """Keep a state, in place of the last one under this name."""
        if self.folder is not None:
            with written_whole(self._path(name)) as part:
                torch.save(state, part)

    def delete(self) -> None:
        """Remove it once the run has come to its end, and the folder if nothing else is there."""
        if self.folder is None:
            return
        for path in (self.folder / RUN, *self.folder.glob(f"{STATE}*")):
            path.unlink(missing_ok=True)
        for path in self.float_logits.glob("*.safetensors"):
            path.unlink()
        for folder in (self.float_logits, self.folder):
            with contextlib.suppress(OSError):
                folder.rmdir()


def checksum(tensors: Iterable[Tensor]) -> str:
    """A fingerprint of tensors' values."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]
