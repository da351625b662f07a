"""Whether kernels have repacked a model's weights: some do at loading, some when first run.

What stands in memory then is no checkpoint's any more. Nothing tells of it, and a kernel's class
hardly does, so it is asked: does the module give what its stored words mean?
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import BiasCompensationError
from .modules import copy_of, device_of, widths_of
from .packed import weight_of

REPACKED = (
    "the weights of {} ({}) are not stored any more as a checkpoint stores them: its kernel has "
    "repacked them, when it was loaded or first run. Load the model again, and compute, attach and "
    "save before it is run, with a kernel that keeps them (GPTQModel's backend 'torch'); or use "
    "`bc-plugin compensate`, which takes the weights from the checkpoint's files."
)


def require_as_stored(
    module: nn.Module, name: str, runs: nn.Module | None = None, asked: set[type] | None = None
) -> None:
    """Make sure that packed weights are as in a checkpoint, in one linear per kind of kernel.

    Args:
        module: Whatever holds linears.
        name: Its path.
        runs: A copy of it that can be run, where it cannot be itself.
        asked: Kinds of kernels that need no look any more; those looked at are added.

    Raises:
        BiasCompensationError: they are not.
    """
    asked = set() if asked is None else asked
    for path, linear in module.named_modules():
        if type(linear) in asked or not isinstance(getattr(linear, "qweight", None), Tensor):
            continue
        asked.add(type(linear))
        twin = copy_of(linear) if runs is None else copy_of(runs.get_submodule(path))
        layout = _layout(linear)
        if layout == "unknown":
            continue
        if layout is None or not _means_what_it_gives(linear, twin, layout):
            raise BiasCompensationError(REPACKED.format(f"{name}.{path}", type(linear).__name__))


def _layout(module: nn.Module) -> str | None:
    """How the words of a linear are laid out; None if like no checkpoint's."""
    bits = _bits(module)
    # AutoAWQ's other kernels have formats of their own, in files, too.
    if not isinstance(bits, int) or type(module).__name__.startswith("WQLinear_GEMV"):
        return "unknown"
    words, (rows, columns) = module.qweight, widths_of(module)
    if words.dtype != getattr(module, "pack_dtype", torch.int32):
        return None
    size = 8 * words.itemsize
    shapes = {"gptq": (rows * bits // size, columns), "awq": (rows, columns * bits // size)}
    found = next((name for name, shape in shapes.items() if shape == tuple(words.shape)), None)
    return found if words.dtype == torch.int32 or found is None else "unknown"


def _bits(module: nn.Module) -> int | None:
    return getattr(module, "bits", getattr(module, "w_bit", None))


def _means_what_it_gives(module: nn.Module, runs: nn.Module, layout: str) -> bool:
    """Whether a linear's output is that of its stored words, zero points in either format."""
    tensors = {
        f"it.{name}": getattr(module, name).detach().cpu()
        for name in ("qweight", "qzeros", "scales", "g_idx")
        if isinstance(getattr(module, name, None), Tensor)
    }
    rows, _ = widths_of(module)
    groups = len(tensors["it.scales"])
    tensors.setdefault("it.g_idx", torch.arange(rows) // -(-rows // groups))
    dtype = tensors["it.scales"].dtype
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(4, rows, generator=generator).to(dtype)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        here = inputs.to(device_of(runs))
        forward = type(runs).forward  # not what may stand in its place, vectors for one
        given = (forward(runs, here) - forward(runs, torch.zeros_like(here))).cpu().double()
    for form in ("gptq", "gptq_v2"):
        settings = {"bits": _bits(module), "quant_method": layout, "format": form}
        wanted = inputs.double() @ weight_of(tensors, "it", settings)
        if float((given - wanted).norm()) <= 0.1 * float(wanted.norm()):
            return True
    return False
