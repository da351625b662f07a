"""Where a model's blocks and quantized linears are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from .errors import BiasCompensationError


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
    """The transformer blocks of a model.

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
    return any(tensor.dim() >= 2 for _, tensor in stored_tensors(module[0]))


def find_blocks(model: nn.Module, path: str | None = None) -> Blocks:
    """Find the list of transformer blocks of ``model``.

    Args:
        path: Where it is, when known; otherwise the outermost ``ModuleList`` whose members are of
            one class and hold weights.

    Raises:
        BiasCompensationError: there is no such list, or more than one.
    """
    lists = [name for name, module in model.named_modules() if _is_block_list(module)]
    outermost = [a for a in lists if not any(a.startswith(b + ".") for b in lists)]
    # A head may be a list of bare linears (YOLOS); blocks consist of several layers.
    composite = [name for name in outermost if any(model.get_submodule(name)[0].children())]
    outermost = composite or outermost
    if path is not None:
        if path not in lists:
            raise BiasCompensationError(
                f"blocks={path!r} is not a list of blocks in {type(model).__name__}; "
                f"lists found: {lists}."
            )
    elif len(outermost) == 1:
        (path,) = outermost
    else:
        raise BiasCompensationError(
            f"{type(model).__name__} has {len(outermost)} lists of blocks: {outermost}. "
            "Name one with blocks=..., e.g. BiasCompensationConfig(blocks='model.layers')."
        )
    count = len(model.get_submodule(path))
    return Blocks(path.rpartition(".")[0], path, tuple(f"{path}.{i}" for i in range(count)))


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
    sites = []
    for name, module in linears_of(float_block):
        try:
            other = quantized_block.get_submodule(name)
        except AttributeError as error:
            raise BiasCompensationError(
                f"the float model has a linear {name!r} where the quantized model has none; "
                "compensation needs two models with the same modules' names."
            ) from error
        # compressed-tensors keeps the class, but no weight until the linear is first run.
        weight = getattr(other, "weight", None)
        if type(other) is type(module) and weight is not None and _same(module.weight, weight):
            continue
        sites.append(name)
    return sites


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
