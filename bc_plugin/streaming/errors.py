"""What is said of checkpoints that cannot be read block by block, or not at all."""

from __future__ import annotations

from pathlib import Path

from ..errors import BiasCompensationError


class CannotStream(BiasCompensationError):
    """The checkpoint may be whole, but is not one whose blocks are read from files here.

    Attributes:
        why: What it is instead.
    """

    def __init__(self, folder: Path, why: str) -> None:
        super().__init__(
            f"{folder} cannot be read block by block: {why}; load it whole, with from_pretrained."
        )
        self.why = why


def no_tensor(path: Path, name: str) -> BiasCompensationError:
    """A checkpoint is not whole."""
    return BiasCompensationError(
        f"{path}: there is no tensor {name}; download or save the checkpoint again."
    )
