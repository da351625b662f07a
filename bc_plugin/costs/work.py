"""Operations of the pass and of refinement, two for each multiplication, as they are counted.

What kernels need to unpack their weights is not among them.
"""

from __future__ import annotations

from ..config import BiasCompensationConfig
from ..refinement.config import RefinementConfig
from ..shift.descent import TURNS
from .shapes import Block, Shapes


def linears_forward(block: Block, tokens: int) -> float:
    """``2 * tokens * sum in * out``; of routed experts the share that tokens come to."""
    return 2.0 * tokens * sum(linear.values * linear.share for linear in block.linears)


def attention_forward(shapes: Shapes, tokens: int, length: int) -> float:
    """``4 * tokens * length * heads * head_dim``: scores and their mean of values, no mask used."""
    return 4.0 * tokens * length * shapes.attention


def blocks_forward(shapes: Shapes, tokens: int, length: int) -> float:
    """All blocks once."""
    return sum(
        linears_forward(block, tokens) + attention_forward(shapes, tokens, length)
        for block in shapes.blocks
    )


def head_forward(shapes: Shapes, tokens: int) -> float:
    """``2 * tokens * hidden * vocabulary``."""
    return 2.0 * tokens * shapes.hidden * shapes.vocabulary


def covariance_products(shapes: Shapes, tokens: int) -> float:
    """``2 * tokens * in^2`` for each input that linears have in common."""
    common = (inputs for block in shapes.blocks for inputs in block.common_inputs)
    return sum(2.0 * tokens * inputs**2 for inputs in common)


def descent(shapes: Shapes) -> float:
    """For ``integers=True``, however many tokens: ``4 * 7 * in^2 * out`` for each linear's turns.

    Of a turn, 4 for the gradient of the integers and its changes, 3 for the normal equations of the
    scales, half of which follow from the others.
    """
    linears = (linear for block in shapes.blocks for linear in block.linears if linear.is_site)
    return sum(TURNS * 7.0 * linear.inputs**2 * linear.outputs for linear in linears)


def pass_work(
    shapes: Shapes, settings: BiasCompensationConfig, tokens: int, length: int
) -> tuple[dict[str, float], float]:
    """Forward passes of all blocks over so many tokens, by what they are for, and operations.

    Float blocks run once, and beside each float linear the quantized one; then the quantized
    blocks. For scales float blocks run once more, and products of their linears' inputs are summed.
    """
    once = blocks_forward(shapes, tokens, length)
    linears = sum(linears_forward(block, tokens) for block in shapes.blocks)
    passes, work = {"float blocks": 1.0}, once
    if "linear" in settings.sites:
        passes["quantized linears"] = 1.0
        work += linears
    if "block" in settings.sites:
        passes["quantized blocks"] = 1.0
        work += once
    if settings.scales or settings.integers:
        passes["float blocks, for scales"] = 1.0
        work += once + covariance_products(shapes, tokens)
    if settings.integers:
        work += descent(shapes)
    return passes, work


def model_forward(shapes: Shapes, tokens: int, length: int) -> float:
    """All blocks and the head once, as to record what the float model predicts."""
    return blocks_forward(shapes, tokens, length) + head_forward(shapes, tokens)


def refinement_work(
    shapes: Shapes, settings: RefinementConfig, held_out: int, batch: int, length: int
) -> tuple[dict[str, float], float]:
    """The same of refinement by model, with the head, in passes over a batch.

    A step is a forward pass and a backward pass of the same size, since weights have no gradients;
    one more forward pass with gradient checkpointing, and products of inputs and gradients for
    scales. Before the first step, and after every ``evaluate_every``, held-out sequences are run.

    Args:
        held_out: Tokens of the sequences held out.
        batch: Tokens of a batch.
    """
    batches = settings.steps * settings.gradient_accumulation_steps
    runs = 2 + settings.gradient_checkpointing + ("scales" in settings.kinds)
    looks = 1 + -(-settings.steps // settings.evaluate_every)
    passes = {
        "forward and backward": float(batches * runs),
        "held-out sequences": looks * held_out / batch,
    }
    work = batches * runs * model_forward(shapes, batch, length)
    return passes, work + looks * model_forward(shapes, held_out, length)
