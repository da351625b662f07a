"""The vectors of a compensated GGUF file: which of its tensors hold them, and what it says of them.

One key of the metadata, ``bias_compensation``, has the entry that a checkpoint's config has, the
names of the biases that hold vectors, and those biases as they were where there were any before.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..errors import BiasCompensationError
from ..names import FILES_DIGEST, KEY
from ..vectors.compensation import Compensation
from .file import GGUFFile, control_of
from .places import Places, places_in

VECTORS_DIGEST = "vectors_digest"


@dataclass(frozen=True)
class Said:
    """What a compensated file says of itself.

    Attributes:
        entry: As ``Compensation.entry`` gave it, with a digest of the other tensors.
        biases: Names of the bias tensors that hold vectors.
        bases: By name, those of them that the model had, float32 as the file had them.
        directions: Names of the tensors of its control vector.
    """

    entry: Mapping[str, Any]
    biases: tuple[str, ...]
    bases: Mapping[str, np.ndarray] = field(default_factory=dict)
    directions: tuple[str, ...] = ()

    def text(self) -> str:
        """One line of JSON."""
        bases = {name: base64.b64encode(base).decode() for name, base in self.bases.items()}
        return json.dumps({**vars(self), "bases": bases})


def said_in(file: GGUFFile) -> Said | None:
    """What a file says of its vectors; None where it has none.

    Raises:
        BiasCompensationError: that is damaged.
    """
    text = file.value(KEY)
    if text is None:
        return None
    try:
        found = json.loads(text)
        bases = {
            name: np.frombuffer(base64.b64decode(base), "<f4")
            for name, base in found["bases"].items()
        }
        said = Said(found["entry"], tuple(found["biases"]), bases, tuple(found["directions"]))
        if not set(bases) <= set(said.biases) <= set(file.tensors):
            raise ValueError("it names tensors that are not there")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BiasCompensationError(
            f"{file.path}: its metadata {KEY!r} is damaged ({error}); get the file again."
        ) from error
    return said


def compensation_in(file: GGUFFile) -> Compensation | None:
    """The vectors of a compensated file, float32 (1, features) each; None where it has none.

    Raises:
        BiasCompensationError: its tensors are not those that the vectors were written with, or its
            control vector is missing or another file's.
    """
    said = said_in(file)
    if said is None:
        return None
    places = places_in(file)
    if file.digest(without=places.biases.values()) != said.entry.get(FILES_DIGEST):
        raise BiasCompensationError(
            f"{file.path}: its tensors are not those that its vectors were written with; it is "
            "damaged, or was quantized again since. Compensate what it was made of."
        )
    found = _biases(file, said, places)
    if said.directions:
        control = _control(file, said)
        sites = {name: site for site, name in places.directions.items()}
        found |= {sites[name]: control.tensors[name].data for name in said.directions}
    vectors = {site: torch.tensor(np.array(vector))[None] for site, vector in found.items()}
    return Compensation.from_entry(said.entry, vectors)


def _biases(file: GGUFFile, said: Said, places: Places) -> dict[str, np.ndarray]:
    found = {}
    for site, name in places.biases.items():
        if name in said.biases:
            stored = file.tensors[name].data
            vector = stored - said.bases[name] if name in said.bases else stored
            found[site] = places.read(name, vector)
    return found


def _control(file: GGUFFile, said: Said) -> GGUFFile:
    path = control_of(file.path)
    if not path.is_file():
        raise BiasCompensationError(
            f"{file.path} goes with the control vector {path}, which is not there; put it beside "
            "the file again."
        )
    control = GGUFFile(path)
    if control.value(f"{KEY}.{VECTORS_DIGEST}") != said.entry.get(VECTORS_DIGEST):
        raise BiasCompensationError(
            f"{path} is the control vector of another file than {file.path}; get the one that was "
            "written with it."
        )
    if not set(said.directions) <= set(control.tensors):
        raise BiasCompensationError(f"{path} has not all vectors that {file.path} names.")
    return control
