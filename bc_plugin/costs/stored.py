"""Bytes of blocks, vectors and models as they are stored."""

from __future__ import annotations

from ..config import BiasCompensationConfig
from .shapes import Block, Linear, Shapes

SCALE, INDEX, VECTOR = 2, 4, 2  # bytes: half precision, 32-bit integers, half precision again


def float_block(block: Block, itemsize: int) -> int:
    """``(sum in * out + others) * itemsize``."""
    return (block.values + block.others) * itemsize


def groups_of(linear: Linear, group_size: int) -> int:
    """``in / group_size``, rounded up; one where ``group_size`` is -1."""
    return 1 if group_size == -1 else -(-linear.inputs // group_size)


def packed_linear(linear: Linear, bits: int, group_size: int) -> int:
    """GPTQ's tensors: integers, and zero points and scales per group, and the group of each input.

    ``in * out * bits / 8 + groups * out * (bits / 8 + 2) + 4 * in``, for each expert.

    Args:
        group_size: Inputs that share a scale; -1 for all.
    """
    groups = groups_of(linear, group_size)
    integers = (linear.inputs + groups) * linear.outputs * bits // 8
    return linear.count * (integers + groups * linear.outputs * SCALE + linear.inputs * INDEX)


def packed_block(block: Block, bits: int, group_size: int, itemsize: int) -> int:
    """Its linears packed; everything else, ``others * itemsize``, as it was."""
    packed = sum(packed_linear(linear, bits, group_size) for linear in block.linears)
    return packed + block.others * itemsize


def packed_model(shapes: Shapes, bits: int, group_size: int, itemsize: int) -> int:
    """All blocks packed, and what is around them as it was."""
    packed = sum(packed_block(block, bits, group_size, itemsize) for block in shapes.blocks)
    return packed + shapes.around * itemsize


def float_model(shapes: Shapes, itemsize: int) -> int:
    """All blocks, and what is around them."""
    return sum(float_block(block, itemsize) for block in shapes.blocks) + shapes.around * itemsize


def vector_values(shapes: Shapes, settings: BiasCompensationConfig, length: int) -> int:
    """``(positions + 1) * (sum of out + hidden)`` over all blocks, where all linears are quantized.

    Args:
        length: Tokens of the longest sequence, which ``positions="all"`` stands for.
    """
    positions = length if settings.positions == "all" else settings.positions
    linears = sum(
        linear.outputs for block in shapes.blocks for linear in block.linears if linear.is_site
    )
    features = ("linear" in settings.sites) * linears
    features += ("block" in settings.sites) * len(shapes.blocks) * shapes.hidden
    return (positions + 1) * features


def scale_values(shapes: Shapes, group_size: int) -> int:
    """``groups * out`` of all linears."""
    return sum(
        groups_of(linear, group_size) * linear.outputs * linear.count
        for block in shapes.blocks
        for linear in block.linears
    )
