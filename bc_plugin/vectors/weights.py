"""What tells the quantized weights of a model in memory apart.

The integers are stored alike by every loader, so every bit of them counts. Scales, norms and biases
may be cast on the way, so of those there are random projections. Zero points are in neither: GPTQ's
two formats have other words for the same ones in memory. A checkpoint's files are bound as a whole,
bit for bit, by ``checkpoint.files_digest``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from ..marks import mark, mark_of
from ..models.blocks import find_block_lists
from ..models.modules import plain_part, stored_tensors
from ..models.offloaded import stored_value
from ..names import KEY
from .fingerprint import alike, fingerprint, projections
from .merge import OWN_BIAS


@dataclass(frozen=True)
class Weights:
    """What tells the quantized weights of a model apart.

    Attributes:
        digest: BLAKE2b over names, shapes and all bytes of the largest matrix of each module;
            where any are packed, of those alone.
        float_weights: Of the floating tensors that are not in it, a text per block: how many there
            are, and their projections.
    """

    digest: str
    float_weights: tuple[str, ...]


@dataclass(frozen=True)
class KeptWeights:
    """What ``weights_of`` needs of a model whose kernels may repack its weights.

    Attributes:
        exact: By path of what holds weights, what its digest is taken over.
        floats: By path of a block.
    """

    exact: dict[str, str]
    floats: dict[str, str]


def keep_weights(model: nn.Module) -> None:
    """Let ``weights_of`` answer later as it would now."""
    lists = [blocks.path for blocks in find_block_lists(model)]
    features = ("out_features", "out_channels")
    sites = [name for name, m in model.named_modules() if any(hasattr(m, f) for f in features)]
    exact = {path: _exact(model, path) for path in _holders(lists, sites)}
    floats = {path: _floats(model, path) for path in _blocks(model, lists)}
    mark(model, KeptWeights(exact, floats))


def forget_floats(model: nn.Module) -> None:
    """Scales or norms were changed on purpose since ``keep_weights``: what they are now counts."""
    kept = mark_of(model, KeptWeights)
    if kept is not None:
        mark(model, KeptWeights(kept.exact, {}))


def forget_weights(model: nn.Module) -> None:
    """Integers as well."""
    if are_kept(model):
        mark(model, KeptWeights({}, {}))


def are_kept(model: nn.Module) -> bool:
    """Whether ``keep_weights`` was called in time."""
    return mark_of(model, KeptWeights) is not None


def weights_of(model: nn.Module, lists: Iterable[str], sites: Iterable[str] = ()) -> Weights:
    """What tells the weights apart that vectors belong to.

    Args:
        lists: Paths of the lists of blocks.
        sites: Names of the sites with vectors.

    Raises:
        BiasCompensationError: some of these weights are offloaded, and not by accelerate.
    """
    lists, kept = list(lists), mark_of(model, KeptWeights) or KeptWeights({}, {})
    digest = hashlib.blake2b(digest_size=16)
    for path in _holders(lists, sites):
        digest.update((kept.exact.get(path) or _exact(model, path)).encode())
    floats = [kept.floats.get(path) or _floats(model, path) for path in _blocks(model, lists)]
    return Weights(digest.hexdigest(), tuple(floats))


def same_floats(first: str, second: str) -> bool:
    """Whether two texts of ``Weights.float_weights`` are of the same tensors, but for casting."""
    (count, *one), (other, *two) = (text.split() or [""] for text in (first, second))
    return count == other and alike(map(float, one), map(float, two), int(count))


def _holders(lists: list[str], sites: Iterable[str]) -> list[str]:
    """Paths of what holds the weights that vectors belong to."""
    inside = tuple(f"{path}." for path in lists)
    return lists + sorted(name for name in sites if not name.startswith(inside))


def _blocks(model: nn.Module, lists: list[str]) -> Iterator[str]:
    for path in lists:
        for name, _ in model.get_submodule(path).named_children():
            yield f"{path}.{name}"


def _exact(model: nn.Module, path: str) -> str:
    weights = {
        name: (f"{path}.{stored}", tensor)
        for name, (stored, tensor) in _exact_tensors(model.get_submodule(path)).items()
    }
    return "".join(  # one at a time: those of a streamed model are read for it
        f"{name} {tuple(tensor.shape)} {fingerprint(plain_part(stored_value(model, place)))}"
        for name, (place, tensor) in sorted(weights.items())
    )


def _exact_tensors(module: nn.Module) -> dict[str, tuple[str, Tensor]]:
    """The largest stored matrix of every submodule; the packed ones alone where there are any."""
    largest: dict[str, tuple[str, Tensor]] = {}
    for name, tensor in stored_tensors(module):
        owner, _, leaf = name.rpartition(".")
        if tensor.dim() < 2 or leaf == KEY:
            continue
        if owner not in largest or tensor.nbytes > largest[owner][1].nbytes:
            largest[owner] = name, tensor
    return {n: w for n, w in largest.items() if not w[1].is_floating_point()} or largest


def _floats(model: nn.Module, path: str) -> str:
    block = model.get_submodule(path)
    exact = {stored for stored, _ in _exact_tensors(block).values()}
    values = {
        name: plain_part(stored_value(model, f"{path}.{name}"))
        for name, tensor in stored_tensors(block)
        if tensor.is_floating_point() and name not in exact and not name.endswith(KEY)
    }
    for name, module in block.named_modules():
        if getattr(module, OWN_BIAS, None) is not None:  # a vector is merged into the other one
            values[f"{name}.bias"] = getattr(module, OWN_BIAS)
    found = [values[name] for name in sorted(values)]
    found = [value for value in found if bool(value.any())]  # some kernels make up a bias
    return " ".join([str(len(found)), *(f"{x:.4f}" for x in projections(found))])
