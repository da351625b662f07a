"""The vectors of a model: computed, saved, loaded, put in place and taken away."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import BiasCompensationError
from ..files import written_whole
from ..models.blocks import find_block_lists
from ..models.modules import device_of, dtype_of
from ..models.positions import PositionTracker
from ..names import KEY
from .attach import AttachedConvolution, AttachedSite
from .check import weights_digest, weights_of
from .checkpoint import checkpoint_files, read_entry, read_vectors
from .entry import FORMAT_VERSION, SiteErrors, read_errors, set_entry, written_number
from .short_names import collapse, expand

FILE = "bias_compensation.safetensors"


class Compensation:
    """Compensation vectors of a quantized model.

    Attributes:
        vectors: For each site, by module path, a tensor of shape (positions + 1, features). Row i
            is added to the output for token i of a sequence, the last row for all later tokens. A
            convolution's has the shape (1, channels), or (patches, channels), patches row by row.
        errors: For each site, the error before and after.
        positions: Number of leading positions with a vector of their own.
        blocks: Paths of the lists of blocks; mostly there is one.
        digest: Of the quantized weights that the vectors belong to.
        joint: Whether the quantizer knew that they would follow, and minimised what they leave.
        refined: How they were trained after the closed form, which ``errors`` are of: ``by``,
            ``steps``, and the loss ``before`` and ``after`` on held-out sequences. None if not.
        seconds: How long computing them took; None when they were loaded.
    """

    seconds: float | None = None

    def __init__(
        self,
        vectors: Mapping[str, Tensor],
        errors: Mapping[str, SiteErrors],
        positions: int,
        blocks: str | Sequence[str],
        digest: str,
        joint: bool = False,
        refined: Mapping[str, Any] | None = None,
    ) -> None:
        self.vectors = dict(vectors)
        self.errors = dict(errors)
        self.positions = positions
        self.blocks = (blocks,) if isinstance(blocks, str) else tuple(blocks)
        self.digest = digest
        self.joint = joint
        self.refined = refined

    def __repr__(self) -> str:
        return (
            f"Compensation({len(self.vectors)} sites, positions={self.positions}, "
            f"{self.nbytes / 2**20:.2f} MiB)"
        )

    @property
    def nbytes(self) -> int:
        """Size of the vectors in bytes."""
        return sum(vectors.nbytes for vectors in self.vectors.values())

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
        if hasattr(model, "_bias_compensation"):
            raise BiasCompensationError("the model is compensated already; detach that first.")
        dtype = dtype_of(model)
        tracker = PositionTracker(self.positions)
        handles = []
        for blocks in find_block_lists(model, self.blocks):
            first = model.get_submodule(blocks.names[0])
            handles += tracker.listen(model.get_submodule(blocks.owner), first)
        sites = []
        for name, vectors in self.vectors.items():
            module = model.get_submodule(name)
            vectors = vectors.to(device_of(module))
            if self.errors[name].kind == "convolution":
                sites.append(AttachedConvolution(module, vectors))
            else:
                sites.append(AttachedSite(module, vectors, tracker, dtype))
        model._bias_compensation = (self, sites, handles)
        set_entry(model, self.entry())

    def detach(self, model: nn.Module) -> None:
        """Take the vectors out of ``model``, which then computes what it did before.

        Raises:
            BiasCompensationError: these vectors are not attached to the model.
        """
        attached, sites, handles = getattr(model, "_bias_compensation", (None, (), ()))
        if attached is None or attached.digest != self.digest:
            raise BiasCompensationError("this compensation is not attached to the model.")
        for site in sites:
            site.detach()
        for handle in handles:
            handle.remove()
        del model._bias_compensation
        set_entry(model, None)

    @staticmethod
    def attached_to(model: nn.Module) -> Compensation | None:
        """The compensation in place in ``model``, if any."""
        return getattr(model, "_bias_compensation", (None,))[0]

    def check(self, model: nn.Module) -> None:
        """Make sure that the vectors belong to ``model``.

        Raises:
            BiasCompensationError: a module is missing, a vector has another shape or holds NaN or
                infinity, or the quantized weights are not those the vectors were computed for.
        """
        modules = dict(model.named_modules())
        for name, vectors in self.vectors.items():
            if name not in modules:
                raise BiasCompensationError(
                    f"there is no module {name!r} in {type(model).__name__}; "
                    "these vectors belong to another model."
                )
            convolution = self.errors[name].kind == "convolution"
            rows = len(vectors) if convolution else self.positions + 1
            width = "out_channels" if convolution else "out_features"
            expected = (rows, getattr(modules[name], width, vectors.shape[-1]))
            if tuple(vectors.shape) != expected:
                raise BiasCompensationError(
                    f"{name}.{KEY} has shape {tuple(vectors.shape)}, expected {expected}; "
                    "these vectors belong to another model or to other positions."
                )
            if not bool(torch.isfinite(vectors).all()):
                raise BiasCompensationError(
                    f"{name}.{KEY} holds NaN or infinity; the file is damaged, compute the "
                    "compensation again."
                )
        lists = [blocks.path for blocks in find_block_lists(model, self.blocks)]
        digest = weights_digest(model, weights_of(lists, self.vectors))
        if digest != self.digest:
            raise BiasCompensationError(
                f"the vectors were computed for quantized weights with digest {self.digest}; this "
                f"model's weights have {digest}. Load the checkpoint they were saved with, or "
                "compute them again with bc_plugin.compensate. (Some kernels repack their weights "
                "when first run: attach before running the model.)"
            )

    # On disk

    def entry(self) -> dict[str, Any]:
        """The ``bias_compensation`` entry of a checkpoint's ``quantization_config``.

        Site names are written short, and errors as one string per group of sites, to keep the
        entry small; see ``bc_plugin.names``.
        """
        groups = collapse(self.vectors)
        errors = {
            short: {
                field: " ".join(written_number(getattr(self.errors[name], field)) for name in names)
                for field in ("before", "after", "held_out_before", "held_out_after")
            }
            for short, names in groups.items()
        }
        sites: dict[str, list[str]] = {}
        for short, names in groups.items():
            sites.setdefault(self.errors[names[0]].kind, []).append(short)
        return {
            "format_version": FORMAT_VERSION,
            "positions": self.positions,
            "blocks": self.blocks[0] if len(self.blocks) == 1 else list(self.blocks),
            "sites": sites,
            "joint": self.joint,
            "refined": self.refined,
            "digest": self.digest,
            "errors": errors,
        }

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
        version = entry.get("format_version")
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise BiasCompensationError(
                f"the compensation has format version {version}; this bc_plugin reads up to "
                f"{FORMAT_VERSION}. Upgrade it: pip install -U bc-plugin."
            )
        try:
            kinds = {
                name: kind
                for kind, shorts in entry["sites"].items()
                for short in shorts
                for name in expand(short)
            }
            positions, blocks, digest = entry["positions"], entry["blocks"], entry["digest"]
            errors = read_errors(entry["errors"], kinds)
        except (KeyError, ValueError, AttributeError, TypeError) as error:
            raise BiasCompensationError(
                f"the {KEY} entry of the quantization config is damaged ({error!r}); take it from "
                "the original checkpoint, or compute the compensation again."
            ) from error
        missing = sorted(set(kinds) - set(tensors))
        if missing:
            raise BiasCompensationError(
                f"{len(missing)} of {len(kinds)} compensation tensors are missing, the first is "
                f"{missing[0]}.{KEY}; the checkpoint is incomplete, download or save it again."
            )
        unknown = sorted(set(tensors) - set(kinds))
        if unknown:
            raise BiasCompensationError(
                f"the checkpoint has {unknown[0]}.{KEY}, which its quantization config does not "
                "announce; the two do not belong together."
            )
        vectors = {name: tensors[name] for name in kinds}
        joint, refined = entry.get("joint", False), entry.get("refined")
        return cls(vectors, errors, positions, blocks, digest, joint, refined)

    def save(self, folder: str | Path) -> Path:
        """Write the vectors alone, to ``bias_compensation.safetensors`` in ``folder``.

        Returns:
            The file's path.
        """
        path = Path(folder) / FILE
        tensors = {f"{name}.{KEY}": v.contiguous().cpu() for name, v in self.vectors.items()}
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
        entry = read_entry(folder)
        if entry is None:
            raise BiasCompensationError(
                f"{folder} holds no compensation: there is no {FILE}, and no {KEY} entry in the "
                "quantization_config of a config.json."
            )
        return cls.from_entry(entry, read_vectors(checkpoint_files(folder)))

    # To look at

    def describe(self) -> list[dict[str, Any]]:
        """One row per site: its name, kind, shape, bytes and errors."""
        return [
            {
                "site": name,
                "shape": tuple(vectors.shape),
                "bytes": vectors.nbytes,
                **asdict(self.errors[name]),
            }
            for name, vectors in self.vectors.items()
        ]
