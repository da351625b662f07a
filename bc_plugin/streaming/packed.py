"""Linears of GPTQ and AWQ checkpoints as they are stored, run without a toolkit's kernel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..models.packed import LEAVES, channel_parts, integers_of, packed_widths
from ..vectors.lazy import LazyTensor
from .stored import StoredLinear

IT = "it"  # a linear of a checkpoint that has no other


class PackedLinear(StoredLinear):
    """Integers, zero points and scales, of which it makes its weight, some channels at a time.

    Args:
        stored: What the file has of it, by name.
        settings: The checkpoint's ``quantization_config``, of GPTQ or AWQ.
    """

    INTEGERS = "qweight"
    TENSORS = (*LEAVES, "bias")

    def __init__(self, stored: Mapping[str, LazyTensor], settings: Mapping[str, Any]) -> None:
        super().__init__(stored)
        self.settings = settings
        self.in_features, self.out_features = packed_widths(self._checkpoint(), IT, settings)

    @staticmethod
    def settings_of(settings: Mapping[str, Any]) -> Mapping[str, Any]:
        """Those of a checkpoint in a known format.

        Raises:
            ValueError: it is in another one.
        """
        layout = settings.get("checkpoint_format") or settings.get("format")
        layout = (layout or settings.get("version") or "gemm").lower()
        known = ("gemm",) if settings["quant_method"] == "awq" else ("gptq", "gptq_v2", "gemm")
        words = settings.get("pack_dtype", "int32")
        if layout not in known or settings.get("dynamic") or words != "int32":
            raise ValueError(
                f"it is in the format {layout!r} of {settings['quant_method']}, known are GPTQ and "
                "AWQ (gemm) with 32-bit words and one width"
            )
        return settings

    @staticmethod
    def needed(settings: Mapping[str, Any]) -> tuple[str, ...]:
        """Names of the tensors without which there is no weight."""
        own = ("g_idx",) if settings["quant_method"] == "gptq" else ()
        return ("qweight", "qzeros", "scales", *own)

    def _checkpoint(self) -> dict[str, Tensor]:
        found = {f"{IT}.{name}": getattr(self, name) for name in LEAVES}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def _weights(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        for channels, part in channel_parts(self._checkpoint(), IT, self.settings):
            yield channels, self._weight(part).to(dtype)

    def _weight(self, part: Mapping[str, Tensor]) -> Tensor:
        """Of some channels, (channels, in_features), in the scales' type, as kernels make it."""
        integers, zeros, groups = integers_of(part, IT, self.settings)
        weight = part[f"{IT}.scales"][groups] * (integers - zeros[groups])
        return weight.T.contiguous()  # CPUs multiply half precision ten times faster so
