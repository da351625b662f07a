"""Sites outside of the blocks, measured where the float model runs them.

A convolution has one vector per channel, in a table of shape (1, channels). With
``positions="all"`` one that cuts images into patches has one for each patch, (patches, channels),
row by row; a class token is not in its output, so it has no row.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..errors import BiasCompensationError
from ..models.calls import Batch, call_model
from ..models.modules import alongside, device_of
from ..ranks import gathered
from .statistics import Site


def cuts_patches(convolution: nn.Conv2d) -> bool:
    """Whether it sees patches that do not overlap."""
    return convolution.kernel_size == convolution.stride and max(convolution.stride) > 1


def measure_outside(
    float_model: nn.Module,
    quantized: Mapping[str, nn.Module],
    kinds: Mapping[str, str],
    fitted: Iterable[Batch],
    apart: Iterable[Batch],
    per_patch: bool,
    dtype: torch.dtype,
) -> dict[str, Site]:
    """Run the float model; what goes into a float site also goes through the quantized one.

    Every place of an output counts, be it an image's padding or not.

    Args:
        quantized: The quantized modules, by path.
        kinds: Their kinds.
        fitted: Calibration batches that vectors are fitted to.
        apart: Those held out.
        per_patch: Whether each patch has a vector of its own.
        dtype: The type the quantized model computes in.

    Returns:
        Those sites that the calibration data reaches, on this rank or on another.

    Raises:
        BiasCompensationError: each patch should have a vector, but images differ in size.
    """
    sites: dict[str, Site] = {}
    now_apart = False

    def prepare(name: str, inputs: Tensor) -> Tensor:
        return inputs.to(device_of(quantized[name]), dtype)

    def compare(name: str, output: Tensor, shifted: Tensor) -> None:
        reference = output.to(shifted.device)
        places = 1
        if kinds[name] == "convolution":
            reference, shifted = reference.movedim(-3, -1), shifted.movedim(-3, -1)
            if per_patch and cuts_patches(float_model.get_submodule(name)):
                places = reference.shape[-3:-1].numel()
        site = sites.setdefault(name, Site(name, kinds[name], places - 1))
        if site.positions != places - 1:
            raise BiasCompensationError(
                f"{name} cuts images into {site.positions + 1} patches and into {places}; "
                'positions="all" needs images of one size. Resize them, or use positions=1.'
            )
        tokens = reference.shape[:-1].numel()
        rows = torch.arange(tokens, device=shifted.device) % places
        site.add(reference, shifted, rows, None, now_apart)

    with alongside(float_model, quantized, prepare, compare):
        for now_apart, batches in ((False, fitted), (True, apart)):  # noqa: B007, compare reads it
            for batch in batches:
                call_model(float_model, batch, device_of(float_model))
    for reached in gathered({name: site.positions for name, site in sites.items()}):
        for name, positions in reached.items():
            sites.setdefault(name, Site(name, kinds[name], positions))
    return {name: sites[name] for name in kinds if name in sites}
