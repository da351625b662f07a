"""Where a model's blocks and quantized linears and convolutions are."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import BiasCompensationError


def stored_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers, by name.

    Not through ``state_dict``: some kernels (bitsandbytes) repack their weights back for it, in
    place, and lose precision on the way.
    """
    for path, child in module.named_modules():
        prefix = f"{path}." if path else ""
        for name, parameter in child._parameters.items():
            if parameter is not None:
                yield prefix + name, parameter
        for name, buffer in child._buffers.items():
            if buffer is not None and name not in child._non_persistent_buffers_set:
                yield prefix + name, buffer


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


def _is_block_list(module: nn.Module) -> bool:
    if not isinstance(module, nn.ModuleList) or len(module) == 0:
        return False
    if len({type(child) for child in module}) != 1:
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
            of one class and hold weights. A list of stages stands for the lists within.

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
    """Whether members consist of several layers, as blocks do; a head may be a list of linears."""
    return any(model.get_submodule(path)[0].children())


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
        found += own
    first = [model.get_submodule(name)[0] for name in found]
    widths = {tuple(tensor.shape for _, tensor in stored_tensors(block)) for block in first}
    return found if len(widths) == len(found) > 1 else []


def _is_linear(module: nn.Module) -> bool:
    # transformers' Conv1D (GPT-2) is a linear with the weight transposed.
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def linears_of(block: nn.Module) -> list[tuple[str, nn.Module]]:
    """The linears of a float block, with their paths within it."""
    return [(name, module) for name, module in block.named_modules() if _is_linear(module)]


def linear_sites(float_block: nn.Module, quantized_block: nn.Module) -> list[str]:
    """Paths, within the block, of the linears that quantization changed.

    Raises:
        BiasCompensationError: a linear of the float block is missing in the quantized one.
    """
    return [n for n, linear in linears_of(float_block) if _changed(n, linear, quantized_block)]


def sites_outside(
    float_model: nn.Module, quantized_model: nn.Module, lists: Sequence[Blocks]
) -> dict[str, str]:
    """Sites outside of the blocks that quantization changed, and the kind of each.

    These are 2D convolutions, such as a patch embedding, and the linears between one list of blocks
    and the next (Swin's patch merging). Other linears, such as heads, are none; nor are
    convolutions within blocks, whose shift the block's own vectors take out.

    Raises:
        BiasCompensationError: one of the float model is missing in the quantized one.
    """
    blocks = tuple(f"{found.path}." for found in lists)
    stages = tuple(f"{found.owner}." for found in lists) if len(lists) > 1 else ()
    kinds = {}
    for name, module in float_model.named_modules():
        convolution = isinstance(module, nn.Conv2d)
        if name.startswith(blocks) or not (
            convolution or (_is_linear(module) and name.startswith(stages))
        ):
            continue
        if _changed(name, module, quantized_model):
            kinds[name] = "convolution" if convolution else "linear"
    return kinds


def _changed(name: str, module: nn.Module, quantized: nn.Module) -> bool:
    try:
        other = quantized.get_submodule(name)
    except AttributeError as error:
        raise BiasCompensationError(
            f"the float model has a {type(module).__name__} {name!r} where the quantized model has "
            "none; compensation needs two models with the same modules' names."
        ) from error
    # compressed-tensors keeps the class, but no weight until the linear is first run.
    weight = getattr(other, "weight", None)
    return type(other) is not type(module) or weight is None or not _same(module.weight, weight)


def others_changed(float_block: nn.Module, quantized_block: nn.Module) -> bool:
    """Whether anything but linears differs by more than the rounding of half precision."""
    linears = tuple(f"{name}." for name, _ in linears_of(float_block))
    kept = dict(quantized_block.named_parameters()) | dict(quantized_block.named_buffers())
    for name, tensor in float_block.named_parameters():
        if name.startswith(linears) or tensor.is_meta:
            continue
        other = kept.get(name)
        if other is None or other.shape != tensor.shape:
            return True
        apart = (other.detach().to(tensor) - tensor.detach()).abs().max()
        if apart > 0.01 * tensor.detach().abs().max():
            return True
    return False


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.is_meta or b.is_meta or a.shape != b.shape:  # meta: offloaded, so not to be compared
        return False
    return torch.equal(a.detach(), b.detach().to(a.device, a.dtype))


def dtype_of(model: nn.Module) -> torch.dtype:
    """The type ``model`` computes in: that of its first floating parameter."""
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def device_of(module: nn.Module) -> torch.device:
    """Where ``module`` computes, also when accelerate keeps its weights elsewhere."""
    for child in module.modules():
        execution = getattr(getattr(child, "_hf_hook", None), "execution_device", None)
        if execution is not None:
            return torch.device(execution)
    return next(stored_tensors(module))[1].device
