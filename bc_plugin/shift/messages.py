"""What the pass says of a whole model, once."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..errors import BiasCompensationError

UNCHANGED = (
    "there is nothing to compensate: the linears of both models are the same. Pass the quantized "
    "model first, then the float model it came from."
)
ONLY_EXPERTS = (
    "there is nothing to compensate: only routed experts differ between the two models, and they "
    "have no vectors of their own. Add 'block' to the sites."
)
NOTHING_COMPARABLE = (
    "no linear that was quantized has an output that can be compared. Add 'block' to the sites: "
    "the vectors of the blocks stand for them."
)
NOTHING_TO_FIT = (
    "scales or integers were to be fitted, but no linear within a block was quantized in a way "
    "that its output can be compared with the float linear's. Leave scales and integers out."
)
SEVERAL_LISTS = (
    "{} has {} lists of blocks: {}. Their tokens are different ones, in different numbers, and no "
    "class token leads all of them, so positions={!r} has no meaning; use positions=0."
)
RESCALED = (
    "some of the quantized model's norms and linears give other outputs than the float model's: "
    "scales were moved or weights rotated within its blocks, as AWQ and SpinQuant do, or it was "
    "trained on. Only outputs of blocks were compensated there. Quantize with "
    "bias_compensation=True in the toolkit, or pass the model just before it was rounded, to "
    "compensate linears, too."
)
AUTOROUND = (
    "AutoRound quantizes this model. It tunes blocks as a whole and leaves little mean shift, so "
    "vectors may make the model worse, in 2 and 3 bits above all. Compare it with and without them "
    "(`bc-plugin evaluate`, and its --without-compensation), or refine it: refinement starts "
    "without vectors where that is better."
)
OTHER_RANKS = (
    "the quantized models of the ranks are not the same: each has quantized for itself. Have all "
    "of them load one checkpoint, or, in a toolkit, the float model as it asks for with ranks."
)
OTHER_MODEL = (
    "the quantized model's {name} gives outputs that do not follow those of the float model's "
    "(correlation {correlation:.2f}), so it was not quantized from this float model as it is. Pass "
    "the quantized model first, then the float model of the same checkpoint. If weights were "
    "rotated, rescaled or trained before they were rounded, pass the model just before that."
)


def require_one_list(model: nn.Module, paths: Sequence[str], positions: int | str) -> None:
    """Refuse positions apart where tokens of several lists of blocks would be meant.

    Raises:
        BiasCompensationError: there are several lists, and positions are not 0.
    """
    if len(paths) > 1 and positions != 0:
        raise BiasCompensationError(
            SEVERAL_LISTS.format(type(model).__name__, len(paths), list(paths), positions)
        )


def about_experts(changed: Sequence[str]) -> str:
    """That the routed experts with these paths are left to their blocks."""
    return (
        f"{len(changed)} weights of routed experts, the first is {changed[0]}, have no vectors of "
        "their own: the quantized model routes other tokens to them. The vectors of their blocks "
        "stand for them, where blocks are compensated."
    )


def about_left(left: Sequence[str], what: str) -> str:
    """That these linears keep their scales, or whatever was to be fitted."""
    return (
        f"{len(left)} linears, the first is {left[0]}, keep the {what} they have: on held-out "
        "sequences others would be worse."
    )
