"""The ``bias_compensation`` entry of a checkpoint's quantization config.

Site names are written short, and errors as one string per group of sites, to keep it small.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BiasCompensationError
from ..names import KEY
from .contents import Contents, SiteErrors
from .short_names import collapse, expand

FORMAT_VERSION = 2


def entry_of(compensation: Contents) -> dict[str, Any]:
    """The entry of a compensation, as JSON-ready values."""
    groups = collapse(compensation.vectors)
    errors = {
        short: {
            field: " ".join(_number(getattr(compensation.errors[name], field)) for name in names)
            for field in ("before", "after", "held_out_before", "held_out_after")
        }
        for short, names in groups.items()
    }
    sites: dict[str, list[str]] = {}
    for short, names in groups.items():
        sites.setdefault(compensation.kinds[names[0]], []).append(short)
    blocks = compensation.blocks
    return {
        "format_version": FORMAT_VERSION,
        "positions": compensation.positions,
        "blocks": blocks[0] if len(blocks) == 1 else list(blocks),
        "sites": sites,
        "joint": compensation.joint,
        "scales": compensation.scales,
        "refined": compensation.refined,
        "digest": compensation.digest,
        "vectors_digest": vectors_digest(compensation.vectors),
        "errors": errors,
    }


def read_entry(entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """An entry and the tensors that it announces, as arguments of ``Compensation``.

    Args:
        entry: As ``entry_of`` gave it.
        tensors: By site name.

    Raises:
        BiasCompensationError: the format is newer, the entry is damaged, or tensors are missing or
            superfluous.
    """
    _check_version(entry)
    try:
        kinds = {
            name: kind
            for kind, shorts in entry["sites"].items()
            for short in shorts
            for name in expand(short)
        }
        found = {
            "kinds": kinds,
            "errors": _read_errors(entry["errors"]),
            "positions": entry["positions"],
            "blocks": entry["blocks"],
            "digest": entry["digest"],
            "joint": entry.get("joint", False),
            "scales": entry.get("scales", False),
            "refined": entry.get("refined"),
        }
        bound_to = entry["vectors_digest"]
        if set(found["errors"]) != set(kinds):
            raise KeyError(*sorted(set(found["errors"]) ^ set(kinds))[:1])
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
    _check_digest(vectors, bound_to)
    return {"vectors": vectors, **found}


def set_entry(model: nn.Module, entry: dict[str, Any] | None) -> None:
    """Keep the model's quantization config in step, since saving the model writes it."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if config is None:
        return
    config = copy.copy(config)  # it may be the user's, for other models too
    values = config if isinstance(config, dict) else vars(config)
    if entry is None:
        values.pop(KEY, None)
    else:
        values[KEY] = entry
    model.config.quantization_config = config


def vectors_digest(vectors: Mapping[str, Tensor]) -> str:
    """BLAKE2b over names, types, shapes and bytes of all vectors."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(vectors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        stored = tensor.detach().cpu().contiguous()
        digest.update(stored.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _check_digest(vectors: Mapping[str, Tensor], expected: str) -> None:
    digest = vectors_digest(vectors)
    if digest == expected:
        return
    for name, tensor in vectors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise BiasCompensationError(
                f"{name}.{KEY} holds NaN or infinity; the file is damaged, download or save the "
                "checkpoint again."
            )
    raise BiasCompensationError(
        f"the compensation tensors (*.{KEY}) are not those that the quantization config was "
        f"written with: their digest is {digest}, expected {expected}. A file is damaged, or "
        "of another checkpoint; download or save the checkpoint again."
    )


def _check_version(entry: Mapping[str, Any]) -> None:
    version = entry.get("format_version")
    if version == 1:
        raise BiasCompensationError(
            "the compensation has format version 1, of a development version, in which nothing "
            "binds the vectors to their checkpoint; compute it again with this bc_plugin."
        )
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise BiasCompensationError(
            f"the compensation has format version {version!r}; this bc_plugin reads "
            f"{FORMAT_VERSION}. Upgrade it."
        )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _read_errors(groups: Mapping[str, Mapping[str, str]]) -> dict[str, SiteErrors]:
    errors = {}
    for short, columns in groups.items():
        rows = zip(*(text.split() for text in columns.values()), strict=True)
        for name, row in zip(expand(short), rows, strict=True):
            values = [None if text == "-" else float(text) for text in row]
            errors[name] = SiteErrors(**dict(zip(columns, values, strict=True)))
    return errors
