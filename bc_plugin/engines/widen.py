"""GPTQ weights of 2 or 3 bits in the 4-bit symmetric format, without changing a value.

Engines such as vLLM have kernels for symmetric 4 and 8 bits only. A weight is
``scale * (q - zero)``; with 2 or 3 bits ``q - zero`` lies between -7 and 7, which 4 bits around a
zero point of 8 can hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import BiasCompensationError
from ..models.packed import integers_of, pack, packed_linears

BITS, ZERO = 4, 8


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


def widen(tensors: dict[str, Tensor], settings: dict[str, Any]) -> None:
    """Widen every packed linear in ``tensors`` (a whole checkpoint), and its settings, in place."""
    for name in packed_linears(tensors):
        values, zeros, groups = integers_of(tensors, name, settings)
        tensors[f"{name}.qweight"] = pack(values - zeros[groups] + ZERO, dim=0)
        # Stored less one, as the format "gptq" has it.
        tensors[f"{name}.qzeros"] = pack(torch.full_like(zeros, ZERO - 1), dim=1)
    settings.update(bits=BITS, sym=True, format="gptq", checkpoint_format="gptq")
