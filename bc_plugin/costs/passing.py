"""Memory of the pass, which reads both models block by block and holds one block of each.

All of it is per process, in bytes. Files that are mapped into memory are no part of it.
"""

from __future__ import annotations

from ..calibration.batches import count_used
from ..config import BiasCompensationConfig
from .shapes import Block, Shapes
from .stored import float_block, packed_block

WIDE, EXACT = 4, 8  # bytes of float32, in which shifts are taken, and of float64, for sums


def sequences_used(samples: int, length: int, max_tokens: int | None) -> int:
    """Those of ``samples`` that the pass takes, of ``length`` tokens each."""
    return samples if max_tokens is None else count_used(samples, samples * length, max_tokens)


def batch_of(sequences: int, length: int, batch_tokens: int) -> int:
    """Tokens of the largest batch: whole sequences, one at least."""
    return length * max(1, min(sequences, batch_tokens // length))


def activation_cache(tokens: int, hidden: int, itemsize: int) -> int:
    """``2 * tokens * hidden * itemsize``: what a block is given and what it gives are both held."""
    return 2 * tokens * hidden * itemsize


def unpacked_linear(block: Block, itemsize: int) -> int:
    """``in * out * itemsize`` of the largest linear, whose weight is made when it is run."""
    return max((each.inputs * each.outputs for each in block.linears), default=0) * itemsize


def intermediates(block: Block, hidden: int, tokens: int, itemsize: int) -> int:
    """What a block makes of one batch, where most is held: as its widest output is compared.

    ``tokens * (3 * itemsize + 4) * out``: what the float and the quantized linear give, the float
    block's other wide tensor (the gate's), and the shift in float32; 4 more per value where the
    two are in half precision and have to be widened. Beside that, ``3 * tokens * hidden *
    itemsize``: the input, what the norm made of it, and the residual.
    """
    widest = max((linear.outputs for linear in block.linears), default=hidden)
    widened = WIDE if itemsize < WIDE else 0
    return tokens * (widest * (3 * itemsize + WIDE + widened) + 3 * hidden * itemsize)


def covariances(block: Block) -> int:
    """For scales and integers: ``2 * 8 * sum in^2`` over the inputs that linears share.

    Two float64 matrices, of the tokens to fit to and of those held out. Three more of the largest
    while they are centred and solved with. And the integers of all linears, a byte each.
    """
    squares = [inputs**2 for inputs in block.common_inputs]
    return 2 * EXACT * sum(squares) + 3 * EXACT * max(squares, default=0) + block.values


def pass_memory(
    shapes: Shapes,
    settings: BiasCompensationConfig,
    bits: int,
    group_size: int,
    itemsize: int,
    sequences: int,
    length: int,
) -> dict[str, int]:
    """Everything that is held at once where most is, by what it is for.

    Args:
        itemsize: Bytes of a value of the type that both models compute in.
        sequences: That this process has.
    """
    tokens = batch_of(sequences, length, settings.batch_tokens)
    largest = max(shapes.blocks, key=lambda block: float_block(block, itemsize))
    found = {
        "float block": float_block(largest, itemsize),
        "quantized block": packed_block(largest, bits, group_size, itemsize),
        "unpacked weight": unpacked_linear(largest, itemsize),
        "activations": activation_cache(sequences * length, shapes.hidden, itemsize),
        "intermediates": intermediates(largest, shapes.hidden, tokens, itemsize),
    }
    if settings.scales or settings.integers:
        found["covariances"] = covariances(largest)
    return found
