"""Which linears and convolutions quantization changed, and whose outputs can be compared."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..errors import BiasCompensationError
from ..models.blocks import Blocks
from ..models.experts import is_routed, stacked_experts
from ..models.modules import is_linear, linears_of
from .messages import OTHER_MODEL
from .rescaling import Rescaling
from .statistics import Site


def linear_sites(float_block: nn.Module, quantized_block: nn.Module) -> list[str]:
    """Paths, within the block, of the linears that quantization changed, routed experts aside.

    Raises:
        BiasCompensationError: a linear of the float block is missing in the quantized one.
    """
    return [path for path in _changed_linears(float_block, quantized_block) if not is_routed(path)]


def changed_experts(float_block: nn.Module, quantized_block: nn.Module) -> list[str]:
    """Paths, within the block, of the routed experts that quantization changed.

    Each is a linear, or a parameter that holds all experts.
    """
    kept = dict(quantized_block.named_parameters())
    linears = filter(is_routed, _changed_linears(float_block, quantized_block))
    stacks = (
        path
        for path, stack in stacked_experts(float_block)
        if path not in kept or not _same(stack, kept[path])
    )
    return [*linears, *stacks]


def _changed_linears(float_block: nn.Module, quantized_block: nn.Module) -> list[str]:
    return [n for n, linear in linears_of(float_block) if _changed(n, linear, quantized_block)]


def comparable(
    float_block: nn.Module, quantized_block: nn.Module, changed: Sequence[str], moved: Rescaling
) -> list[str]:
    """Those of the changed linears whose outputs stand for those of the float linears.

    Args:
        moved: The scales that are known to have been moved within the block.
    """
    if not moved.inputs and others_changed(float_block, quantized_block):
        return []
    return [path for path in changed if path not in moved.outputs]


def require_same_block(site: Site) -> None:
    """Refuse a block that was quantized from another one.

    Raises:
        BiasCompensationError: its outputs do not follow those of the float block.
    """
    if site.agreement.is_missing:
        correlation = site.agreement.correlation()
        raise BiasCompensationError(OTHER_MODEL.format(name=site.name, correlation=correlation))


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
            convolution or (is_linear(module) and name.startswith(stages))
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
    """Whether anything but linears and experts differs by more than half precision rounds."""
    linears = tuple(f"{name}." for name, _ in linears_of(float_block))
    experts = {name for name, _ in stacked_experts(float_block)}
    kept = dict(quantized_block.named_parameters()) | dict(quantized_block.named_buffers())
    for name, tensor in float_block.named_parameters():
        if name.startswith(linears) or name in experts or tensor.is_meta:
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
    if type(a.data) is not type(b.data):  # TorchAO's; torch.equal does not know all of them
        return False
    return torch.equal(a.detach(), b.detach().to(a.device, a.dtype))
