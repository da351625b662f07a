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

from .errors import BiasCompensationError

BITS, ZERO = 4, 8
WORD = 32


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
    bits = settings["bits"]
    stored_less_one = "gptq_v2" not in (settings.get("format"), settings.get("checkpoint_format"))
    for key in [name for name in tensors if name.endswith(".qweight")]:
        name = key.removesuffix(".qweight")
        values = unpack(tensors[key], bits, dim=0)
        zeros = unpack(tensors[f"{name}.qzeros"], bits, dim=1)
        if stored_less_one:
            zeros = (zeros + 1) & (2**bits - 1)
        groups = tensors[f"{name}.g_idx"].long()
        tensors[key] = pack(values - zeros[groups] + ZERO, dim=0)
        # Stored less one, as the format "gptq" has it.
        tensors[f"{name}.qzeros"] = pack(torch.full_like(zeros, ZERO - 1), dim=1)
    settings.update(bits=BITS, sym=True, format="gptq", checkpoint_format="gptq")


def unpack(packed: Tensor, bits: int, dim: int) -> Tensor:
    """Integers from 32-bit words in which they follow each other along ``dim``; int64."""
    words = packed.movedim(dim, 0).long() & 0xFFFFFFFF
    count = words.shape[0] * WORD // bits
    start = torch.arange(count) * bits
    word, offset = start // WORD, (start % WORD).view(-1, *[1] * (words.dim() - 1))
    following = words[(word + 1).clamp(max=len(words) - 1)]
    both = (words[word] >> offset) | (following << (WORD - offset))
    return (both & (2**bits - 1)).movedim(0, dim)


def pack(values: Tensor, dim: int) -> Tensor:
    """4-bit integers as 32-bit words along ``dim``."""
    values = values.movedim(dim, 0)
    values = values.reshape(-1, WORD // BITS, *values.shape[1:])
    shifts = (torch.arange(WORD // BITS) * BITS).view(1, -1, *[1] * (values.dim() - 2))
    words = (values << shifts).sum(1)
    words = torch.where(words >= 2**31, words - 2**32, words)  # the sign bit is a bit like others
    return words.to(torch.int32).movedim(0, dim).contiguous()
