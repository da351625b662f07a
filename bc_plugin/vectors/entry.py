"""The ``bias_compensation`` entry of a checkpoint's quantization config.

Site names are written short, and errors as one string per group of sites, to keep it small.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import astuple
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BiasCompensationError
from ..names import KEY
from .contents import Contents, SiteErrors
from .fields import require_fields
from .sealed import seal, unseal
from .short_names import MOST, collapse, expand

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
        "float_weights": list(compensation.float_weights),
        "errors": errors,
        "vectors_digest": vectors_digest(compensation),
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
    require_fields(entry, FORMAT_VERSION)
    try:
        kinds = _read_sites(entry["sites"])
        found = {
            "kinds": kinds,
            "errors": _read_errors(entry["errors"]),
            **{name: entry[name] for name in ("positions", "blocks", "digest", "joint", "scales")},
            **{name: entry[name] for name in ("refined", "float_weights")},
        }
        if set(found["errors"]) != set(kinds):
            raise ValueError(f"errors and sites differ, in {set(found['errors']) ^ set(kinds)}")
    except (KeyError, ValueError, AttributeError, TypeError, OverflowError) as error:
        raise BiasCompensationError(
            f"the {KEY} entry is damaged, in its sites or errors ({error}); take it from the "
            "original checkpoint, or compute the compensation again."
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
            f"the checkpoint has {unknown[0]}.{KEY}, which its {KEY} entry does not announce; the "
            "two do not belong together."
        )
    found = {"vectors": {name: tensors[name] for name in kinds}, **found}
    _check_digest(Contents(**found), entry["vectors_digest"])
    return found


def set_entry(model: nn.Module, entry: dict[str, Any] | None) -> None:
    """Keep the model's config in step, since saving the model writes it.

    The entry is one of its quantization settings; of a model that no toolkit quantized, it stands
    beside the others.
    """
    config = getattr(model, "config", None)
    if config is None:
        return
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        _set(vars(config), entry)
        return
    # They may be the user's, for other models too.
    if isinstance(settings, dict):
        settings = unseal(settings)
        _set(settings, entry)
        settings = seal(settings)  # they are saved as they are
    else:
        settings = copy.copy(settings)
        _set(vars(settings), entry)
    config.quantization_config = settings


def _set(values: dict[str, Any], entry: dict[str, Any] | None) -> None:
    if entry is None:
        values.pop(KEY, None)
    else:
        values[KEY] = entry


def vectors_digest(contents: Contents) -> str:
    """BLAKE2b over all vectors, their names, types, shapes and bytes, and what is said of them."""
    digest = hashlib.blake2b(digest_size=16)
    said = [contents.positions, contents.blocks, contents.joint, contents.scales, contents.refined]
    said += [contents.digest, contents.float_weights]
    digest.update(json.dumps(said, sort_keys=True).encode())
    for name, tensor in sorted(contents.vectors.items()):
        errors = [_number(value) for value in astuple(contents.errors[name])]
        about = f"{name} {contents.kinds[name]} {errors} {tensor.dtype} {tuple(tensor.shape)}"
        digest.update(about.encode())
        stored = tensor.detach().cpu().contiguous()
        digest.update(stored.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _check_digest(contents: Contents, expected: str) -> None:
    digest = vectors_digest(contents)
    if digest == expected:
        return
    for name, tensor in contents.vectors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise BiasCompensationError(
                f"{name}.{KEY} holds NaN or infinity; the file is damaged, download or save the "
                "checkpoint again."
            )
    raise BiasCompensationError(
        f"the compensation tensors (*.{KEY}) are not those that the {KEY} entry was written with, "
        "or the entry itself was changed (its positions, blocks, sites, errors, joint, scales, "
        "refined, digest, float_weights or vectors_digest): their digest is "
        f"{digest}, expected {expected}. A file is damaged, or of another checkpoint; download or "
        "save the checkpoint again."
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _read_sites(sites: Mapping[str, list[str]]) -> dict[str, str]:
    kinds: dict[str, str] = {}
    for kind, shorts in sites.items():
        for short in shorts:
            kinds |= dict.fromkeys(expand(short), kind)
            if len(kinds) > MOST:
                raise ValueError(f"more than {MOST} sites")
    return kinds


def _read_errors(groups: Mapping[str, Mapping[str, str]]) -> dict[str, SiteErrors]:
    errors = {}
    for short, columns in groups.items():
        rows = zip(*(text.split() for text in columns.values()), strict=True)
        for name, row in zip(expand(short), rows, strict=True):
            values = [None if text == "-" else float(text) for text in row]
            errors[name] = SiteErrors(**dict(zip(columns, values, strict=True)))
    return errors
