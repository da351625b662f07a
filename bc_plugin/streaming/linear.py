"""Linears of GPTQ and AWQ checkpoints as they are stored, run without a toolkit's kernel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..models.packed import WORD, integers_of

AT_ONCE = 1 << 20  # weights that are there as numbers at any time
TENSORS = ("qweight", "qzeros", "scales", "g_idx", "bias")


class PackedLinear(nn.Module):
    """Integers, zero points and scales, of which it makes its weight, some columns at a time.

    Tensors have the names, shapes and types of the file, so their digest is that of any loader.

    Args:
        tensors: By their names; on the meta device they are filled later.
        settings: The checkpoint's ``quantization_config``, of GPTQ or AWQ.
    """

    def __init__(self, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> None:
        super().__init__()
        self.settings = settings
        for name in TENSORS:
            self.register_buffer(name, tensors.get(name))
        rows, self.out_features = self.qweight.shape[0], self.scales.shape[1]
        along_rows = settings["quant_method"] == "gptq"
        self.in_features = rows * WORD // settings["bits"] if along_rows else rows

    def forward(self, inputs: Tensor) -> Tensor:
        """``inputs``, (..., in_features), times the weight, plus the bias; in the inputs' type."""
        output = inputs.new_empty(*inputs.shape[:-1], self.out_features)
        step = max(WORD, AT_ONCE // self.in_features // WORD * WORD)
        for start in range(0, self.out_features, step):
            stop = min(start + step, self.out_features)
            output[..., start:stop] = inputs @ self._columns(start, stop).to(inputs)
        return output if self.bias is None else output.add_(self.bias.to(inputs))

    def _columns(self, start: int, stop: int) -> Tensor:
        """The weight of some output features, (in_features, stop - start), in the scales' type."""
        whole = slice(start, stop)
        bits = self.settings["bits"]
        words = slice(start * bits // WORD, -(-stop * bits // WORD))
        packed_along = whole if self.settings["quant_method"] == "gptq" else words
        part = {
            "it.qweight": self.qweight[:, packed_along],
            "it.qzeros": self.qzeros[:, words],
            "it.g_idx": self.g_idx,
        }
        integers, zeros, groups = integers_of(part, "it", self.settings)
        integers = integers - zeros[:, : stop - start][groups]
        return self.scales[:, whole][groups] * integers
