"""GPTQ weights of 2 or 3 bits in the 4-bit symmetric format, without changing a value.

Engines such as vLLM have kernels for symmetric 4 and 8 bits only. A weight is
``scale * (q - zero)``; with 2 or 3 bits ``q - zero`` lies between -7 and 7, which 4 bits around a
zero point of 8 can hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import BiasCompensationError
from ..models.packed import WORD, integers_of, pack, packed_linears, packed_widths
from ..vectors.lazy import LazyTensor
from .remade import remade

BITS, ZERO = 4, 8
ZEROS = 0x77777777  # a word of zero points, stored less one, as the format "gptq" has it


def needs_widening(settings: Mapping[str, Any]) -> bool:
    """Whether a checkpoint has to be widened for an engine without kernels for its width.

    Raises:
        BiasCompensationError: it cannot be.
    """
    if settings.get("quant_method") != "gptq":
        return False
    bits, sym = settings.get("bits"), settings.get("sym", True)
    if bits in (2, 3):
        return True
    if bits in (4, 8) and sym:
        return False
    raise BiasCompensationError(
        f"vLLM has no kernel for GPTQ with {bits} bits and sym={sym}; quantize with 4 or 8 bits "
        "and sym=True, or with 2 or 3 bits, which export widens to 4."
    )


def widen(tensors: dict[str, LazyTensor], settings: dict[str, Any]) -> None:
    """Widen every packed linear in ``tensors`` (a whole checkpoint), and its settings, in place."""
    for name in packed_linears(tensors):
        inputs, outputs = packed_widths(tensors, name, settings)
        weight = (inputs * BITS // WORD, outputs)
        zeros = torch.Size((tensors[f"{name}.qzeros"].shape[0], outputs * BITS // WORD))
        tensors[f"{name}.qweight"] = remade(
            tensors, name, settings, _widened, torch.int32, weight, dim=1
        )
        tensors[f"{name}.qzeros"] = LazyTensor(
            torch.int32, zeros, partial(torch.full, zeros, ZEROS, dtype=torch.int32)
        )
    settings.update(bits=BITS, sym=True, format="gptq", checkpoint_format="gptq")


def _widened(tensors: Mapping[str, Tensor], name: str, settings: Mapping[str, Any]) -> Tensor:
    values, zeros, groups = integers_of(tensors, name, settings)
    return pack(values - zeros[groups] + ZERO, BITS, dim=0)
