"""Integers in 32-bit words, as GPTQ and AWQ checkpoints hold them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

WORD = 32
# AWQ's kernels want the columns of each word in this order.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
# What is stored of a linear, by output channel along the second axis but for the last.
LEAVES = ("qweight", "qzeros", "scales", "g_idx")
AT_ONCE = 1 << 18  # integers that are unpacked at once: what is made of them fits into caches


def packed_linears(tensors: Mapping[str, Any]) -> list[str]:
    """The linears of a checkpoint that are packed, by path."""
    return [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]


def packed_widths(
    tensors: Mapping[str, Any], name: str, settings: Mapping[str, Any]
) -> tuple[int, int]:
    """Features in and out of a packed linear, whose tensors need but have shapes."""
    rows, columns = tensors[f"{name}.qweight"].shape
    if settings["quant_method"] == "awq":
        return rows, columns * WORD // settings["bits"]
    return rows * WORD // settings["bits"], columns


def channel_parts(
    tensors: Mapping[str, Tensor], name: str, settings: Mapping[str, Any]
) -> Iterator[tuple[slice, dict[str, Tensor]]]:
    """A packed linear in parts of some output channels each, so that few are unpacked at once.

    Args:
        tensors, settings: As ``integers_of`` has them.

    Yields:
        Which channels, and what is stored of them, as ``integers_of`` takes it.
    """
    inputs, outputs = packed_widths(tensors, name, settings)
    step = max(WORD, AT_ONCE // inputs // WORD * WORD)  # whole words begin and end there
    for start in range(0, outputs, step):
        count = min(step, outputs - start)
        part = {}
        for leaf in filter(lambda leaf: f"{name}.{leaf}" in tensors, LEAVES):
            stored = tensors[f"{name}.{leaf}"]
            if leaf != "g_idx":
                first, length = (n * stored.shape[1] // outputs for n in (start, count))
                stored = stored.narrow(1, first, length)
            part[f"{name}.{leaf}"] = stored
        yield slice(start, start + count), part


def integers_of(
    tensors: Mapping[str, Tensor], name: str, settings: Mapping[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """What a packed linear consists of.

    Args:
        tensors: A whole checkpoint.
        settings: Its ``quantization_config``, of GPTQ or AWQ.

    Returns:
        The integers, (in_features, out_features); the zero points, (groups, out_features); and the
        group of each input channel, (in_features,), int64. The others are int32.
    """
    bits, qweight, qzeros = settings["bits"], tensors[f"{name}.qweight"], tensors[f"{name}.qzeros"]
    if settings["quant_method"] == "awq":
        values, zeros = (in_order(unpack(packed, bits, dim=1)) for packed in (qweight, qzeros))
        groups = torch.arange(len(values), device=values.device) // (len(values) // len(zeros))
        return values, zeros, groups
    if "gptq_v2" in (settings.get("format"), settings.get("checkpoint_format")):
        zeros = unpack(qzeros, bits, dim=1)
    else:
        zeros = _plus_one(qzeros, bits)
    return unpack(qweight, bits, dim=0), zeros, tensors[f"{name}.g_idx"].long()


def weight_of(tensors: Mapping[str, Tensor], name: str, settings: Mapping[str, Any]) -> Tensor:
    """The weight of a packed linear, ``scale * (q - zero)``, float64 (in_features, out_features).

    Args:
        tensors, settings: As ``integers_of`` has them.
    """
    values, zeros, groups = integers_of(tensors, name, settings)
    return tensors[f"{name}.scales"].double()[groups] * (values - zeros[groups])


def _plus_one(qzeros: Tensor, bits: int) -> Tensor:
    """Zero points that are stored less one."""
    if bits == 3:
        return (unpack(qzeros, bits, dim=1) + 1) & (2**bits - 1)
    # The one was taken from whole words, in which a zero point of zero borrows from the next.
    ones = sum(1 << start for start in range(0, WORD, bits))
    return unpack(qzeros + ones, bits, dim=1)


def in_order(columns: Tensor) -> Tensor:
    """Columns as they were before AWQ packed them."""
    words = columns.view(len(columns), -1, len(AWQ_ORDER))
    return words[..., torch.tensor(AWQ_ORDER).argsort()].reshape(columns.shape)


def unpack(packed: Tensor, bits: int, dim: int, padded: bool = False) -> Tensor:
    """Integers from 32-bit words in which they follow each other along ``dim``; int32.

    Args:
        padded: As ``pack`` has it.
    """
    words = packed.movedim(dim, 0)
    ones = [1] * (words.dim() - 1)
    if padded or WORD % bits == 0:
        shifts = bits * torch.arange(WORD // bits, dtype=torch.int32, device=packed.device)
        values = (words[:, None] >> shifts.view(-1, *ones)) & (2**bits - 1)
        return values.flatten(0, 1).movedim(0, dim)
    words = words.long() & 0xFFFFFFFF
    count = words.shape[0] * WORD // bits
    start = torch.arange(count, device=packed.device) * bits
    word, offset = start // WORD, (start % WORD).view(-1, *ones)
    following = words[(word + 1).clamp(max=len(words) - 1)]
    both = (words[word] >> offset) | (following << (WORD - offset))
    return (both & (2**bits - 1)).int().movedim(0, dim)


def pack(values: Tensor, bits: int, dim: int, padded: bool = False) -> Tensor:
    """Integers as 32-bit words in which they follow each other along ``dim``; int32.

    Args:
        padded: Whether a word has as many as go whole into it, and no part of another.
    """
    values = values.movedim(dim, 0)
    each, words = (WORD // bits, 1) if padded or WORD % bits == 0 else (WORD, bits)
    values = values.reshape(-1, each, *values.shape[1:]).long()
    found = values.new_zeros(len(values), words, *values.shape[2:])
    for place in range(each):
        word, start = divmod(place * bits, WORD)
        found[:, word] |= values[:, place] << start & 0xFFFFFFFF
        if start + bits > WORD:
            found[:, word + 1] |= values[:, place] >> (WORD - start)
    found = found.flatten(0, 1)
    found = torch.where(found >= 2**31, found - 2**32, found)  # the sign bit is a bit like others
    return found.int().movedim(0, dim).contiguous()
