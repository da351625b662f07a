"""The vectors of a model: put in place and taken away, saved and loaded."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import BiasCompensationError
from ..files import written_whole
from ..names import KEY, SUFFIX
from .attach import attach, attached_to, detach
from .check import check
from .checkpoint import checkpoint_files, read_settings, read_vectors
from .contents import Contents
from .entry import entry_of, read_entry
from .joint import mark_joint

FILE = "bias_compensation.safetensors"
SCALES_ELSEWHERE = (
    "these vectors belong to a model whose scales were fitted with them, and Compensation.save "
    "writes vectors alone: save the model, too, with its save_pretrained. The checkpoint it was "
    "made of has other scales, and these vectors do not belong to it."
)


class Compensation(Contents):
    """Compensation vectors of a quantized model; for its attributes see ``Contents``."""

    # In place

    def attach(self, model: nn.Module) -> None:
        """Compensate ``model`` from now on; saving it then saves the vectors too.

        Raises:
            BiasCompensationError: the model is compensated already, or the vectors belong to
                other weights, or do not fit its modules.
        """
        self.check(model)
        self.attach_unchecked(model)

    def attach_unchecked(self, model: nn.Module) -> None:
        """``attach`` for a loader that has called ``check`` before its kernels repacked weights."""
        attach(self, model)

    def detach(self, model: nn.Module) -> None:
        """Take the vectors out of ``model``, which then computes what it did before.

        What is computed for it afterwards keeps the rule that joint weights have their vectors.

        Raises:
            BiasCompensationError: these vectors are not attached to the model.
        """
        detach(self, model)
        if self.joint:
            mark_joint(model, (name for name, kind in self.kinds.items() if kind == "linear"))

    @staticmethod
    def attached_to(model: nn.Module) -> Compensation | None:
        """The compensation in place in ``model``, if any."""
        return attached_to(model)

    def check(self, model: nn.Module) -> None:
        """Make sure that the vectors belong to ``model``.

        Raises:
            BiasCompensationError: a module is missing, a vector has another shape or holds NaN or
                infinity, or the quantized weights are not those the vectors were computed for.
        """
        check(self, model)

    # On disk

    def entry(self) -> dict[str, Any]:
        """The ``bias_compensation`` entry of a checkpoint's ``quantization_config``."""
        return entry_of(self)

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Compensation:
        """Put an entry and the tensors it announces together again.

        Args:
            entry: As ``entry`` gave it.
            tensors: By site name.

        Raises:
            BiasCompensationError: the format is newer, the entry is damaged, or tensors are
                missing or superfluous.
        """
        return cls(**read_entry(entry, tensors))

    def save(self, folder: str | Path) -> Path:
        """Write the vectors alone, to ``bias_compensation.safetensors`` in ``folder``.

        Scales that were fitted with them are in the model's own tensors, so a warning says that
        its checkpoint is needed, too.

        Returns:
            The file's path.
        """
        if self.scales:
            warnings.warn(SCALES_ELSEWHERE, stacklevel=2)
        path = Path(folder) / FILE
        tensors = {name + SUFFIX: v.contiguous().cpu() for name, v in self.vectors.items()}
        with written_whole(path) as part:
            save_file(tensors, part, metadata={"format": "pt", KEY: json.dumps(self.entry())})
        return path

    @classmethod
    def load(cls, folder: str | Path) -> Compensation:
        """Read the vectors that ``save`` wrote, or those of a compensated checkpoint.

        Raises:
            BiasCompensationError: ``folder`` holds neither, or they are incomplete.
        """
        folder = Path(folder)
        alone = folder / FILE
        if alone.is_file():
            with safe_open(alone, "pt") as file:
                entry = json.loads((file.metadata() or {}).get(KEY, "{}"))
            return cls.from_entry(entry, read_vectors([alone]))
        entry = read_settings(folder).get(KEY)
        if entry is None:
            raise BiasCompensationError(
                f"{folder} holds no compensation: there is no {FILE}, and no {KEY} entry in the "
                "quantization_config of a config.json."
            )
        return cls.from_entry(entry, read_vectors(checkpoint_files(folder)))
