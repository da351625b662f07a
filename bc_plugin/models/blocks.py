"""Where a model's blocks are."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ..errors import BiasCompensationError
from .modules import stored_tensors


@dataclass(frozen=True)
class Blocks:
    """A list of transformer blocks.

    Attributes:
        owner: Path of the module that holds the list and runs through it ("" is the model).
        path: Path of the list.
        names: Path of each block, in the order they run.
    """

    owner: str
    path: str
    names: tuple[str, ...]

    def modules(self, model: nn.Module) -> list[nn.Module]:
        """The blocks themselves."""
        return [model.get_submodule(name) for name in self.names]


def _is_block_list(module: nn.Module) -> bool:
    if not isinstance(module, nn.ModuleList) or len(module) == 0:
        return False
    kinds = {type(child) for child in module}
    # Attention and state-space blocks in turns (Jamba) are classes of one file.
    mixed = len({kind.__module__ for kind in kinds}) == 1 and all(map(_has_parts, module))
    if len(kinds) != 1 and not mixed:
        return False
    # Stages of a convolutional backbone (DETR's ResNet) hold nothing but 4D weights.
    return any(tensor.dim() in (2, 3) for _, tensor in stored_tensors(module[0]))


def find_block_lists(
    model: nn.Module, paths: str | Sequence[str] | None = None
) -> tuple[Blocks, ...]:
    """Find the lists of transformer blocks of ``model``.

    A hierarchical model (Swin) has one in each of its stages, an encoder-decoder (DETR, BART) one
    on each side. Any other model with several lists, such as a language model with a vision tower,
    may be meant to be quantized in part only, so which ones to compensate has to be said.

    Args:
        paths: Where they are, when known; otherwise the outermost ``ModuleList`` whose members are
            of one class, or of several that are defined together, and hold weights. A list of
            stages stands for the lists within.

    Raises:
        BiasCompensationError: there is no such list, or which ones are meant is not clear.
    """
    lists = [name for name, module in model.named_modules() if _is_block_list(module)]
    if paths is None:
        paths = _outermost(model, lists)
        if len(paths) != 1 and not _encoder_and_decoder(paths):
            raise BiasCompensationError(
                f"{type(model).__name__} has {len(paths)} lists of blocks: {paths}. Name one, or "
                "several, with blocks=..., e.g. BiasCompensationConfig(blocks='model.layers')."
            )
    paths = [paths] if isinstance(paths, str) else list(paths)
    for path in paths:
        if path not in lists:
            raise BiasCompensationError(
                f"blocks={path!r} is not a list of blocks in {type(model).__name__}; "
                f"lists found: {lists}."
            )
    paths = [found for path in paths for found in _within_stages(model, path, lists) or [path]]
    for path in paths:
        if any(path.startswith(f"{other}.") for other in paths) or paths.count(path) > 1:
            raise BiasCompensationError(
                f"blocks={paths}: {path!r} is there twice, or lies within another list; name each "
                "list of blocks once."
            )
    return tuple(
        Blocks(
            path.rpartition(".")[0],
            path,
            tuple(f"{path}.{i}" for i in range(len(model.get_submodule(path)))),
        )
        for path in paths
    )


def find_blocks(model: nn.Module, path: str | Sequence[str] | None = None) -> Blocks:
    """``find_block_lists`` for what works on a single list: toolkits and refinement.

    Raises:
        BiasCompensationError: there is no such list, or more than one.
    """
    found = find_block_lists(model, path)
    if len(found) > 1:
        raise BiasCompensationError(
            f"{type(model).__name__} has {len(found)} lists of blocks: "
            f"{[blocks.path for blocks in found]}; this works on one. Name it with blocks=..., or "
            "compensate the quantized model with bc_plugin.compensate, which takes all of them."
        )
    return found[0]


def _is_composite(model: nn.Module, path: str) -> bool:
    return _has_parts(model.get_submodule(path)[0])


def _has_parts(module: nn.Module) -> bool:
    """Whether it consists of several layers, as blocks do; a head may be a list of linears."""
    return any(module.children())


def _outermost(model: nn.Module, lists: list[str]) -> list[str]:
    outermost = [a for a in lists if not any(a.startswith(f"{b}.") for b in lists)]
    return [path for path in outermost if _is_composite(model, path)] or outermost


def _encoder_and_decoder(paths: Sequence[str]) -> bool:
    """Whether these are the two sides of one encoder-decoder."""
    return len(paths) == 2 and len({re.sub(r"\bdecoder\b", "encoder", p) for p in paths}) == 1


def _within_stages(model: nn.Module, path: str, lists: list[str]) -> list[str]:
    """The lists of blocks within a list of stages; none where ``path`` is a list of blocks.

    Blocks may hold lists, too (experts, MobileBERT's feed-forward layers), but theirs are alike in
    all blocks, while each stage has blocks of a width of its own.
    """
    found = []
    for stage in range(len(model.get_submodule(path))):
        own = [name for name in lists if name.rpartition(".")[0] == f"{path}.{stage}"]
        if len(own) != 1 or not _is_composite(model, own[0]):
            return []
        if len({type(member) for member in model.get_submodule(own[0])}) != 1:
            return []  # the parts of one block, as T5 has them
        found += own
    first = [model.get_submodule(name)[0] for name in found]
    widths = {tuple(tensor.shape for _, tensor in stored_tensors(block)) for block in first}
    return found if len(widths) == len(found) > 1 else []
