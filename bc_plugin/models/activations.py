"""Activations on disk, memory-mapped."""

from __future__ import annotations

import os
import tempfile

import torch
from torch import Tensor

from ..errors import BiasCompensationError


def on_disk(values: Tensor) -> Tensor:
    """A copy in a temporary file that is gone with it, even if the process is killed.

    The file is where ``TMPDIR`` says, and should be on a disk: ``/tmp`` may be in memory.

    Raises:
        BiasCompensationError: there is no room.
    """
    number, path = tempfile.mkstemp(prefix="bc_plugin-")
    try:
        os.posix_fallocate(number, 0, max(values.nbytes, 1))  # a full disk would be a signal later
        copy = torch.from_file(path, shared=True, size=values.numel(), dtype=values.dtype)
    except OSError as error:
        raise BiasCompensationError(
            f"there is no room for {values.nbytes / 1e6:.0f} MB of activations in "
            f"{tempfile.gettempdir()} ({error}); name another folder with TMPDIR, or use fewer "
            "calibration tokens (max_tokens)."
        ) from error
    finally:
        os.close(number)
        os.unlink(path)
    return copy.view(values.shape).copy_(values)
