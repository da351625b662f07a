"""The vectors of a model: put in place and taken away, saved and loaded."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import BiasCompensationError
from ..files import written_whole
from ..names import FILE, FILES_DIGEST, KEY, SUFFIX
from .attach import attach, attached_to, detach
from .check import check
from .checkpoint import (
    bound_to,
    checkpoint_files,
    naming,
    read_metadata,
    read_vectors,
    require_bound,
)
from .contents import Contents
from .entry import entry_of, read_entry, set_entry
from .joint import entry_to_save, mark_joint, saved_without
from .settings import read_settings

SCALES_ELSEWHERE = (
    "these vectors belong to a model whose scales, norms or integers were fitted with them, and "
    "Compensation.save writes vectors alone: save the model, too, with its save_pretrained. The "
    "checkpoint it was made of has others, and these vectors do not belong to it."
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
        """Take the vectors out of ``model``, or of what it wraps; it computes what it did before.

        Joint weights are known as such afterwards: what is computed for the model has vectors for
        them, and a checkpoint saved without says so, and loads with a warning and the plugin only.

        Raises:
            BiasCompensationError: these vectors are not attached to the model.
        """
        within = detach(self, model)
        if self.joint:
            mark_joint(within, (name for name, kind in self.kinds.items() if kind == "linear"))
        set_entry(within, entry_to_save(within))

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
        without = saved_without(entry)
        if without:
            raise BiasCompensationError(
                f"the checkpoint has no vectors, on which {len(without)} of its linears count, the "
                f"first is {without[0]}: they were detached before it was saved. Load the model "
                "and attach them, or compute them again with `bc-plugin compensate`."
            )
        return cls(**read_entry(entry, tensors))

    def save(self, folder: str | Path) -> Path:
        """Write the vectors alone, to ``bias_compensation.safetensors`` in ``folder``.

        Beside a checkpoint they are bound to its files: ``load`` then refuses others. Scales that
        were fitted with them are in the model's own tensors, so a warning says that its checkpoint
        is needed, too.

        Returns:
            The file's path.
        """
        if self.scales:
            warnings.warn(SCALES_ELSEWHERE, stacklevel=2)
        path, entry = Path(folder) / FILE, self.entry()
        with suppress(BiasCompensationError):  # whatever else is there may be anything
            if Path(folder).is_dir() and checkpoint_files(folder):
                entry = bound_to(folder, entry)
        tensors = {name + SUFFIX: v.contiguous().cpu() for name, v in self.vectors.items()}
        with written_whole(path) as part:
            save_file(tensors, part, metadata={"format": "pt", KEY: json.dumps(entry)})
        return path

    @classmethod
    def load(cls, folder: str | Path) -> Compensation:
        """Read the vectors of a compensated checkpoint, or those that ``save`` wrote.

        Raises:
            BiasCompensationError: ``folder`` holds neither, or they are damaged or incomplete.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise BiasCompensationError(f"there is no folder {folder}.")
        entry, files = read_settings(folder).get(KEY), [folder / FILE]
        if entry is not None:
            files = checkpoint_files(folder)
            if not files:
                raise BiasCompensationError(
                    f"{folder} has a {KEY} entry, but no model.safetensors and no index of several "
                    "files; the checkpoint is incomplete, download or save it again."
                )
        elif files[0].is_file():
            entry = read_metadata(files[0]).get(KEY)
            if isinstance(entry, dict) and FILES_DIGEST in entry:
                require_bound(entry, checkpoint_files(folder))
        if entry is None:
            raise BiasCompensationError(
                f"{folder} holds no compensation: there is no {KEY} entry in the "
                f"quantization_config of a config.json, and no {FILE}."
            )
        vectors = read_vectors(files)
        with naming(files):
            return cls.from_entry(entry, vectors)
