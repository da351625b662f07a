"""Float weights in the place of packed ones, for engines with quantized formats of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import BiasCompensationError
from ..models.packed import packed_linears, weight_of


def dequantize(tensors: dict[str, Tensor], settings: Mapping[str, Any], dtype: torch.dtype) -> None:
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
        weight = weight_of(tensors, name, settings)
        tensors[f"{name}.weight"] = weight.T.to(dtype).contiguous()
        for leaf in ("qweight", "qzeros", "scales", "g_idx"):
            tensors.pop(f"{name}.{leaf}", None)
