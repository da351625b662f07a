"""A compensated GGUF file: every tensor as it was, the vectors as biases, the rest beside it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from ..errors import BiasCompensationError
from ..names import FILES_DIGEST, KEY
from ..vectors.compensation import Compensation
from .compensated import VECTORS_DIGEST, Said, said_in
from .file import GGUFFile, control_of
from .places import Places, places_in

ARCHITECTURE = "general.architecture"
CONTROL_VECTOR = "controlvector"


def write_compensated(source: GGUFFile, out: Path, compensation: Compensation) -> Compensation:
    """Write ``out``, and ``out``'s control vector where blocks have no bias to put vectors into.

    Every tensor of ``source`` is copied byte for byte, and so are its metadata; vectors that it has
    already are left out. A bias that the model has of its own becomes the sum.

    Args:
        source: The quantized file, or an earlier compensation of it.
        out: Where to; what is there is overwritten.
        compensation: With ``positions=0``, of sites that ``places_in(source)`` has.

    Returns:
        The vectors as the file has them, float32.

    Raises:
        BiasCompensationError: there is no place for a vector, or a bias of the model's own is not
            in F32.
    """
    places = places_in(source)
    _require_places(compensation, places, source)
    before = said_in(source)
    bases = _bases(source, places, before)
    biases, vectors = _biases(compensation, places, bases)
    directions = {
        places.directions[site]: vector
        for site, vector in vectors.items()
        if site in places.directions
    }
    kept = compensation.replaced(
        vectors={site: torch.tensor(np.array(vector))[None] for site, vector in vectors.items()}
    )
    entry = {**kept.entry(), FILES_DIGEST: source.digest(without=places.biases.values())}
    own = {name: base for name, base in bases.items() if name in biases}
    said = Said(entry, tuple(biases), own, tuple(directions))
    dropped = set(before.biases) - set(bases) - set(biases) if before else set()
    _write(source, out, {**bases, **biases}, dropped, said.text())
    written = GGUFFile(out)
    if written.digest(without=places.biases.values()) != entry[FILES_DIGEST]:
        raise BiasCompensationError(f"{out} has other tensors than {source.path}; please report.")
    if directions:
        _write_control(source, control_of(out), directions, entry[VECTORS_DIGEST])
    return kept


def _require_places(compensation: Compensation, places: Places, source: GGUFFile) -> None:
    if compensation.positions != 0:
        raise BiasCompensationError(
            f"these vectors set {compensation.positions} leading positions apart, and a GGUF file "
            "has one bias for all; compute them with positions=0."
        )
    left = [site for site in compensation.vectors if site not in places]
    if left:
        raise BiasCompensationError(
            f"{source.path} has no place for {len(left)} of {len(compensation.vectors)} vectors, "
            f"the first is that of {left[0]}: llama.cpp reads no bias there. Compute them with "
            "only=places_in(file).__contains__, so that blocks see what is left out."
        )


def _bases(source: GGUFFile, places: Places, before: Said | None) -> dict[str, np.ndarray]:
    """The biases that the model has of its own, where vectors can go."""
    bases = dict(before.bases) if before else {}
    for name in places.biases.values():
        tensor = source.tensors.get(name)
        if tensor is None or (before and name in before.biases):
            continue
        if tensor.tensor_type.name != "F32":
            raise BiasCompensationError(
                f"{source.path}: {name} is stored as {tensor.tensor_type.name}; a vector is added "
                "to a bias in F32, as llama.cpp's converter writes it."
            )
        bases[name] = np.array(tensor.data)
    return bases


def _biases(
    compensation: Compensation, places: Places, bases: dict[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Biases by tensor, and vectors by site as these and the control vector will have them."""
    biases, vectors = {}, {}
    for site, vector in compensation.vectors.items():
        value = vector[0].float().cpu().numpy()
        name = places.biases.get(site)
        if name is None:
            vectors[site] = value
            continue
        base = bases.get(name)
        stored = places.stored(name, value)
        biases[name] = stored if base is None else base + stored
        # What is read back is the difference, which rounding may have moved.
        vectors[site] = value if base is None else places.read(name, biases[name] - base)
    return biases, vectors


def _write(
    source: GGUFFile, out: Path, biases: dict[str, np.ndarray], dropped: set[str], said: str
) -> None:
    from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter

    reader = source.reader
    writer = GGUFWriter(out, source.architecture, endianess=reader.endianess)
    writer.data_alignment = int(reader.alignment)
    for name, found in reader.fields.items():
        if name.startswith("GGUF.") or name in (ARCHITECTURE, KEY):
            continue
        kind, *rest = found.types
        if kind != GGUFValueType.ARRAY or rest:  # the writer takes no empty arrays, nor need it
            writer.add_key_value(name, found.contents(), kind, rest[-1] if rest else None)
    writer.add_string(KEY, said)
    data = {name: tensor.data for name, tensor in source.tensors.items() if name not in dropped}
    data |= biases
    for name, values in data.items():
        kind = GGMLQuantizationType.F32
        if name not in biases:
            kind = source.tensors[name].tensor_type
        writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, values in data.items():
        own = None if name in biases else reader.endianess
        writer.write_tensor_data(np.ascontiguousarray(values), tensor_endianess=own)
    writer.close()


def _write_control(
    source: GGUFFile, out: Path, directions: dict[str, np.ndarray], digest: str
) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(out, CONTROL_VECTOR, endianess=source.reader.endianess)
    writer.add_string(f"{CONTROL_VECTOR}.model_hint", source.architecture)
    writer.add_uint32(f"{CONTROL_VECTOR}.layer_count", len(directions))
    writer.add_string(f"{KEY}.{VECTORS_DIGEST}", digest)
    for name, vector in directions.items():
        writer.add_tensor(name, np.ascontiguousarray(vector))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
