"""Quantized linears as integers and group scales, whatever their kernels pack them into.

The integers are read by running: with scales that are powers of two a kernel gives, for unit
vectors, its integers less their zero points, times these, and no rounding. So it does not matter
how bits are packed and zero points stored, and a kernel that has its scales elsewhere, or in
another order, is found out, since what it gives is then not whole.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import BiasCompensationError
from ..ranks import are_several
from .modules import stop_offloading, widths_of

AT_ONCE = 2048  # input channels whose columns are asked for in one run
FORMATS = "GPTQ, AWQ (gemm) and compressed-tensors (pack-quantized)"


@dataclass(frozen=True)
class Layout:
    """Names of a quantized linear's tensors.

    Attributes:
        packed: The integers.
        scales, groups: The scales, and the group of each input channel, if there is such a tensor.
        channels: The dimension of the scales that output channels are along.
    """

    packed: str
    scales: str
    groups: str
    channels: int


LAYOUTS = (
    Layout("qweight", "scales", "g_idx", channels=1),  # GPTQ and AWQ
    Layout("weight_packed", "weight_scale", "weight_g_idx", channels=0),  # compressed-tensors
)


PACKED = tuple(layout.packed for layout in LAYOUTS)


@dataclass(frozen=True)
class IntegerWeight:
    """The weight of a quantized linear, ``integers * scales[:, groups]``.

    Attributes:
        integers: Less their zero points, (out_features, in_features); int8, of 8 bits int16.
        groups: The group of each input channel, int64 (in_features,).
        stored: The toolkit's own scales, (out_features, groups); a view of them.
    """

    integers: Tensor
    groups: Tensor
    stored: Tensor

    @property
    def scales(self) -> Tensor:
        """A copy, float64 (out_features, groups)."""
        return self.stored.to(torch.float64, copy=True)

    def rounded(self, scales: Tensor) -> Tensor:
        """Scales as ``write`` would leave them, float64; infinite where they do not fit."""
        return scales.to(self.stored.dtype).double()

    def write(self, scales: Tensor) -> None:
        """Set the toolkit's own scales, (out_features, groups)."""
        overwrite(self.stored, scales)


@torch.no_grad()
def integer_weights(
    block: nn.Module,
    paths: Sequence[str],
    copy_to_run: Callable[[nn.Module], nn.Module],
    dtype: torch.dtype,
) -> dict[str, IntegerWeight]:
    """What quantized linears of a block consist of.

    Args:
        block: Of the quantized model; in the end as it was, bit for bit.
        paths: Of the linears within it.
        copy_to_run: Makes of the block the copy that is run.
        dtype: The type the quantized model computes in.

    Raises:
        BiasCompensationError: a linear is of another format, or its kernel has repacked it.
    """
    stored = {path: stored_scales(path, block.get_submodule(path)) for path in paths}
    found = {}
    if are_several():  # and share the tensors, maybe
        block = copy.deepcopy(block)
        stop_offloading(block)
    with ExitStack() as probing:
        probes = {}
        for path in stored:
            scales, _ = stored_scales(path, block.get_submodule(path))
            probes[path] = _powers_of_two(scales)
            probing.enter_context(holding(scales, probes[path]))
            bias = getattr(block.get_submodule(path), "bias", None)
            if bias is not None:
                probing.enter_context(holding(bias, torch.zeros_like(bias)))
        twin = copy_to_run(block)
        for path, (scales, groups) in stored.items():
            integers = _integers(path, twin.get_submodule(path), probes[path][:, groups], dtype)
            found[path] = IntegerWeight(integers, groups, scales)
    return found


def packed_tensor(linear: nn.Module) -> Tensor | None:
    """The toolkit's own integers of a quantized linear; None if it is of another format."""
    layout = _layout(linear)
    return None if layout is None else _tensor(linear, layout.packed).detach()


def linears_with_scales(block: nn.Module) -> list[str]:
    """Paths of the linears in a quantized block that have integers with scales beside them."""
    return [path for path, module in block.named_modules() if _layout(module) is not None]


def _layout(linear: nn.Module) -> Layout | None:
    return next((one for one in LAYOUTS if _tensor(linear, one.packed) is not None), None)


def stored_scales(path: str, linear: nn.Module) -> tuple[Tensor, Tensor]:
    """The scales, a view of (out_features, groups), and the groups, (in_features,).

    Raises:
        BiasCompensationError: a linear is of another format.
    """
    layout = _layout(linear)
    if layout is None:
        raise _refused(path, linear, "it has no packed integers with scales beside them")
    scales, groups = _tensor(linear, layout.scales), _tensor(linear, layout.groups)
    width = widths_of(linear)
    if scales is None or scales.dim() != 2 or scales.shape[layout.channels] != width[1]:
        shape = None if scales is None else tuple(scales.shape)
        raise _refused(path, linear, f"its scales have the shape {shape}, {width[1]} channels")
    scales = scales.detach() if layout.channels == 0 else scales.detach().T
    count = scales.shape[1]
    # compressed-tensors marks a tensor that is not in use by negative numbers.
    if groups is None or len(groups) == 0 or bool((groups < 0).any()):
        groups = torch.arange(width[0], device=scales.device) // -(-width[0] // count)
    if len(groups) != width[0] or int(groups.max()) >= count:
        raise _refused(path, linear, f"{len(groups)} inputs are in groups of {count} scales")
    return scales, groups.long()


def _tensor(linear: nn.Module, name: str) -> Tensor | None:
    value = getattr(linear, name, None)
    return value if isinstance(value, Tensor) and not value.is_meta else None


def _powers_of_two(scales: Tensor) -> Tensor:
    """1, 2 or 4 for each scale, so that no two channels or groups are alike."""
    generator = torch.Generator().manual_seed(0)
    return 2.0 ** torch.randint(3, scales.shape, generator=generator).to(scales)


@contextmanager
def holding(tensor: Tensor, values: Tensor) -> Iterator[None]:
    """While it lasts, a tensor has other values."""
    tensor = tensor.detach()
    kept = tensor.clone()
    try:
        overwrite(tensor, values)
        yield
    finally:
        overwrite(tensor, kept)


@torch.inference_mode()  # what toolkits make in it can be changed only in it
def overwrite(tensor: Tensor, values: Tensor) -> None:
    """Set all values of a tensor, in its own type."""
    tensor.copy_(values)


def _integers(path: str, kernel: nn.Module, probes: Tensor, dtype: torch.dtype) -> Tensor:
    found = torch.empty(probes.shape, dtype=torch.int16, device=probes.device)
    for inputs in torch.arange(probes.shape[1], device=probes.device).split(AT_ONCE):
        units = torch.zeros(len(inputs), probes.shape[1], dtype=dtype, device=probes.device)
        units.scatter_(1, inputs[:, None], 1)
        try:
            weight = kernel(units).T.float() / probes[:, inputs].float()
        except Exception as error:
            raise _refused(path, kernel, f"it cannot be run ({error})") from error
        found[:, inputs] = whole = weight.round().to(torch.int16)
        if not torch.equal(weight, whole.float()):  # nor is NaN
            raise _refused(path, kernel, "its kernel has repacked them, or multiplies otherwise")
    return found.to(torch.int8) if bool(found.abs().max() <= 127) else found


def _refused(path: str, linear: nn.Module, why: str) -> BiasCompensationError:
    return BiasCompensationError(
        f"{path} is a {type(linear).__name__}, whose integers and scales cannot be told apart: "
        f"{why}. Fitting scales takes {FORMATS}, loaded and not yet run; leave scales out, or load "
        "the checkpoint with another backend."
    )
