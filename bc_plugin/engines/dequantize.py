"""Float weights in the place of packed ones, for engines with quantized formats of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import BiasCompensationError
from ..models.packed import LEAVES, packed_linears, packed_widths, weight_of
from ..vectors.lazy import LazyTensor
from .remade import remade


def dequantize(
    tensors: dict[str, LazyTensor], settings: Mapping[str, Any], dtype: torch.dtype
) -> None:
    """Replace every packed linear in ``tensors`` (a whole checkpoint) by a float one, in place.

    Args:
        settings: The checkpoint's ``quantization_config``.
        dtype: What the weights, ``scale * (q - zero)``, are rounded to.

    Raises:
        BiasCompensationError: it is neither GPTQ's nor AWQ's "gemm" format.
    """
    method = settings.get("quant_method")
    layout = settings.get("format") or settings.get("version") or "gemm"
    if method not in ("gptq", "awq") or (method == "awq" and layout.lower() != "gemm"):
        raise BiasCompensationError(
            f"a checkpoint of {method!r} in the format {layout!r} cannot be written with float "
            "weights here, as llama.cpp's converter needs them; GPTQ and AWQ (gemm) can."
        )
    for name in packed_linears(tensors):
        shape = packed_widths(tensors, name, settings)[::-1]
        tensors[f"{name}.weight"] = remade(tensors, name, settings, _weight, dtype, shape, dim=0)
        for leaf in LEAVES:
            tensors.pop(f"{name}.{leaf}", None)


def _weight(tensors: Mapping[str, Tensor], name: str, settings: Mapping[str, Any]) -> Tensor:
    return weight_of(tensors, name, settings).T
