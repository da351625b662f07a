"""Memory and disk of refinement by model: the packed model, and what its backward pass needs.

All of it is per process, in bytes; each has the whole model and its share of the sequences.
"""

from __future__ import annotations

from ..config import BiasCompensationConfig
from ..refinement.config import RefinementConfig
from .passing import WIDE
from .shapes import Block, Shapes
from .stored import float_model, packed_model, scale_values, vector_values

COPIES = 7  # of a trained value: start, step, gradient, Adam's two moments, now and best
STATE = 4  # of those on disk: the moments, now and best
RECORDED = 8  # bytes of a recorded prediction: float32, and the token's number in 32 bits


def kept_of_block(block: Block, hidden: int, itemsize: int, scales: bool = False) -> int:
    """Bytes per token that a block keeps for the backward pass, its weights having no gradients.

    ``itemsize * (sum of out + sum of in, of the linears that close a part of it)``: what comes out
    of a linear goes into a norm, a product or a nonlinearity, each of which keeps it, and what goes
    into a closing one came from such. In half precision the two norms keep theirs in float32.
    Linears whose scales are trained keep their inputs: beside the closing ones', the two norms'.
    """
    outputs = sum(linear.outputs * linear.count * linear.share for linear in block.linears)
    inputs = sum(linear.inputs * linear.share for linear in block.linears if linear.closes)
    widened = 2 * hidden * max(0, WIDE - itemsize)
    inputs += 2 * hidden if scales else 0
    return round(itemsize * (outputs + inputs)) + widened


def kept_activations(
    shapes: Shapes, tokens: int, itemsize: int, checkpointing: bool, scales: bool = False
) -> int:
    """``tokens`` times the sum over all blocks of what each keeps.

    With gradient checkpointing: what goes into every block, ``blocks * hidden * itemsize``, and
    what the largest block keeps while it is run again.
    """
    kept = [kept_of_block(block, shapes.hidden, itemsize, scales) for block in shapes.blocks]
    if checkpointing:
        return tokens * (len(kept) * shapes.hidden * itemsize + max(kept))
    return tokens * sum(kept)


def gradients_of_block(shapes: Shapes, tokens: int, itemsize: int) -> int:
    """``3 * tokens * out * itemsize`` of the widest linear: a gated product's and its factors'."""
    widest = max(linear.outputs for block in shapes.blocks for linear in block.linears)
    return 3 * tokens * widest * itemsize


def weight_through_kernel(shapes: Shapes, itemsize: int) -> int:
    """``in * (in + 2 * out) * itemsize`` of the linear where that is most.

    A kernel without a backward pass is asked for its weight then, by unit vectors; one that has
    one needs less.
    """
    linears = (linear for block in shapes.blocks for linear in block.linears)
    return max(each.inputs * (each.inputs + 2 * each.outputs) for each in linears) * itemsize


def logits_and_gradient(shapes: Shapes, tokens: int) -> int:
    """``2 * tokens * vocabulary * 4``."""
    return 2 * tokens * shapes.vocabulary * WIDE


def unpacked_integers(shapes: Shapes) -> int:
    """A byte for each of the linears' integers, for scales that are trained."""
    return sum(block.values for block in shapes.blocks)


def trained_values(
    shapes: Shapes,
    settings: BiasCompensationConfig,
    train: tuple[str, ...],
    group_size: int,
    length: int,
) -> int:
    """Vectors, scales and norms, those that are trained."""
    return (
        ("vectors" in train) * vector_values(shapes, settings, length)
        + ("scales" in train) * scale_values(shapes, group_size)
        + ("norms" in train) * shapes.norms
    )


def optimizer_state(values: int) -> int:
    """``7 * 4 * values``: each in float32 as start, step, gradient, two moments, now and best."""
    return COPIES * WIDE * values


def refinement_memory(
    shapes: Shapes,
    settings: RefinementConfig,
    bits: int,
    group_size: int,
    itemsize: int,
    tokens: int,
    values: int,
) -> dict[str, int]:
    """Everything that is held at once in a step, by what it is for.

    Args:
        itemsize: Bytes of a value of the type that the model computes in.
        tokens: Of a batch.
        values: Number of values that are trained.
    """
    kept = settings.gradient_checkpointing, "scales" in settings.kinds
    found = {
        "packed model": packed_model(shapes, bits, group_size, itemsize),
        "activations": kept_activations(shapes, tokens, itemsize, *kept),
        "gradients": gradients_of_block(shapes, tokens, itemsize),
        "unpacked weight": weight_through_kernel(shapes, itemsize),
        "logits": logits_and_gradient(shapes, tokens),
        "optimizer": optimizer_state(values),
    }
    if "scales" in settings.kinds:
        found["integers"] = unpacked_integers(shapes)
    return found


def recording_memory(shapes: Shapes, itemsize: int, tokens: int) -> dict[str, int]:
    """What recording the float model's predictions needs before: the model, and logits thrice."""
    return {
        "float model": float_model(shapes, itemsize),
        "logits": 3 * tokens * shapes.vocabulary * WIDE,
    }


def recorded_predictions(shapes: Shapes, sequences: int, length: int, top_k: int | None) -> int:
    """``sequences * (length - 1) * top_k * 8`` on disk."""
    kept = min(top_k or shapes.vocabulary, shapes.vocabulary)
    return sequences * (length - 1) * kept * RECORDED


def progress_on_disk(values: int) -> int:
    """``2 * 4 * 4 * values``: Adam's moments, now and best; twice while a file replaces another."""
    return 2 * STATE * WIDE * values
