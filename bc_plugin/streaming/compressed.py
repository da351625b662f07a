"""Linears of compressed-tensors checkpoints as they are stored, run a few channels at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import lcm
from typing import Any

import torch
from torch import Tensor

from ..models.packed import AT_ONCE, WORD
from ..vectors.lazy import LazyTensor
from .stored import StoredLinear

FORMAT = "pack-quantized"
SHAPE, ZEROS = "weight_shape", "weight_zero_point"


class CompressedLinear(StoredLinear):
    """Integers, scales and zero points, of which compressed-tensors makes its weight, in parts.

    Args:
        stored: What the file has of it, by name.
        scheme: compressed-tensors' own, of all linears of the checkpoint.

    Raises:
        ValueError: shapes do not fit each other, in the version of compressed-tensors that is
            installed (0.19 packs 3, 5, 6 and 7 bits otherwise than 0.17).
    """

    INTEGERS = "weight_packed"
    TENSORS = (INTEGERS, "weight_scale", ZEROS, "weight_g_idx", SHAPE, "bias")

    def __init__(self, stored: Mapping[str, LazyTensor], scheme: Any) -> None:
        super().__init__(stored)
        self.scheme = scheme
        self.out_features, self.in_features = stored[SHAPE].read().tolist()
        words = _words(self.in_features, scheme, 1)
        expected = self.out_features, words
        if tuple(self.weight_packed.shape) != expected:
            raise ValueError(
                f"its integers have the shape {tuple(self.weight_packed.shape)}, the compressed-"
                f"tensors that is installed packs them into {expected}"
            )
        # Where whole words of zero points begin and end, which hold those of several channels.
        whole = lcm(WORD, WORD // scheme.weights.num_bits)
        self.step = max(whole, AT_ONCE // self.in_features // whole * whole)

    @staticmethod
    def settings_of(settings: Mapping[str, Any]) -> Any:
        """The scheme of a checkpoint's ``quantization_config``.

        Raises:
            ValueError: there are several, or it is not one of packed integers alone.
        """
        from compressed_tensors.quantization import QuantizationScheme

        others = ("kv_cache_scheme", "transform_config")
        groups = list(settings["config_groups"].values())
        formats = {settings.get("format"), *(group.get("format") or FORMAT for group in groups)}
        if formats != {FORMAT} or any(settings.get(name) for name in others):
            raise ValueError(f"of compressed-tensors {FORMAT} without transforms is known")
        schemes = [QuantizationScheme.model_validate(group) for group in groups]
        if any(s.weights != schemes[0].weights or s.input_activations for s in schemes):
            raise ValueError("its linears have several schemes, or quantized activations")
        return schemes[0]

    @classmethod
    def needed(cls, scheme: Any) -> tuple[str, ...]:
        """Names of the tensors without which there is no weight."""
        zeros = () if scheme.weights.symmetric else (ZEROS,)
        return (cls.INTEGERS, "weight_scale", SHAPE, *zeros)

    def _weights(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        from compressed_tensors.compressors.base import BaseCompressor

        compressor = BaseCompressor.get_value_from_registry(FORMAT)
        for start in range(0, self.out_features, self.step):
            count = min(self.step, self.out_features - start)
            part = {
                self.INTEGERS: self.weight_packed.narrow(0, start, count),
                "weight_scale": self.weight_scale.narrow(0, start, count).to(dtype),
                SHAPE: torch.Size((count, self.in_features)),
            }
            if self.weight_zero_point is not None:
                first, length = (_words(n, self.scheme, 0) for n in (start, count))
                part[ZEROS] = self.weight_zero_point.narrow(0, first, length)
            if self.weight_g_idx is not None:
                part["weight_g_idx"] = self.weight_g_idx
            weight = compressor.decompress(part, self.scheme)["weight"]
            yield slice(start, start + count), weight.to(dtype)


def _words(count: int, scheme: Any, dim: int) -> int:
    """How many words integers along a dimension are packed into."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    shape = (1, count) if dim else (count, 1)
    empty = torch.zeros(shape, dtype=torch.int8)
    return pack_to_int32(empty, scheme.weights.num_bits, dim).shape[dim] if count else 0
