"""Sites within one block, measured on the float model's stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from ..errors import BiasCompensationError
from ..models.calls import BlockCalls
from ..models.mixers import convolved_linears
from ..models.modules import alongside, device_of, dtype_of, gives_features
from ..models.tracker import PositionTracker
from ..vectors.in_place import AttachedSite
from .rescaling import Rescaling
from .statistics import Site


def measure_linears(
    name: str,
    number: int,
    reference: nn.Module,
    quantized: nn.Module,
    linears: Sequence[str],
    stream: Sequence[BlockCalls],
    positions: int,
    rescaling: Rescaling,
    dtype: torch.dtype,
) -> tuple[list[Site], list[Tensor]]:
    """Run the float block; each float linear's input also goes through the quantized one.

    Args:
        name, number: Path and number of the block.
        reference, quantized: The float and the quantized block.
        linears: Paths within the block of those to measure.
        stream: What the block is called with.
        positions: Number of leading positions with a vector of their own.
        rescaling: The scales that were moved within the block.
        dtype: The type the quantized model computes in.

    Returns:
        The sites, and the float block's outputs, one for each call.
    """
    convolved = convolved_linears(reference)
    linears = [linear for linear in linears if linear not in convolved]
    sites = {linear: Site(f"{name}.{linear}", "linear", positions) for linear in linears}
    current: BlockCalls | None = None

    def prepare(linear: str, inputs: Tensor) -> Tensor:
        return rescaling.input_of(linear, inputs).to(dtype)

    def compare(linear: str, output: Tensor, shifted: Tensor) -> None:
        if gives_features(reference.get_submodule(linear), output):
            sites[linear].update(current, output, shifted)

    modules = {linear: quantized.get_submodule(linear) for linear in linears}
    device, float_dtype = device_of(quantized), dtype_of(reference)
    outputs = []
    with alongside(reference, modules, prepare, compare):
        for current in stream:
            output = current.run(reference, number, device, float_dtype, lasting=True)
            check_finite(output, name, "float")
            outputs.append(current.kept(output))
    return list(sites.values()), outputs


def measure_block(
    name: str,
    number: int,
    quantized: nn.Module,
    vectors: Mapping[str, Tensor],
    stream: Sequence[BlockCalls],
    positions: int,
    references: Sequence[Tensor],
    dtype: torch.dtype,
) -> Site:
    """Run the quantized block, with its linears compensated, on the float stream.

    Args:
        vectors: Of the block's linears, by path within it, (positions + 1, features) each.
        positions: Number of leading positions with a vector of their own.
        references: What the float block gives, one for each call.
    """
    site, tracker = Site(name, "block", positions), PositionTracker(positions)
    device = device_of(quantized)
    with ExitStack() as attached:
        for path, own in vectors.items():
            linear = AttachedSite(quantized.get_submodule(path), own, tracker, dtype)
            attached.callback(linear.detach)
        for calls, reference in zip(stream, references, strict=True):
            with tracker.during(calls.index):
                output = calls.run(quantized, number, device, dtype)
            check_finite(output, name, "quantized")
            site.update(calls, reference.to(output.device), output)
    return site


def check_finite(output: Tensor, name: str, which: str) -> None:
    """Refuse values that are not finite, before they get into a mean."""
    if not bool(torch.isfinite(output).all()):
        raise BiasCompensationError(
            f"the {which} model's block {name!r} gives values that are not finite on the "
            f"calibration data (type {output.dtype}); try bfloat16 or float32."
        )
