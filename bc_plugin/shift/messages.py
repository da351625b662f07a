"""What the pass says of a whole model, once."""

from __future__ import annotations

from collections.abc import Sequence

UNCHANGED = (
    "there is nothing to compensate: the linears of both models are the same. Pass the quantized "
    "model first, then the float model it came from."
)
ONLY_EXPERTS = (
    "there is nothing to compensate: only routed experts differ between the two models, and they "
    "have no vectors of their own. Add 'block' to the sites."
)
RESCALED = (
    "the quantized model's norms are not the float model's: scales were moved within its blocks, "
    "as AWQ does, or it was trained on, so outputs of single linears may stand for others. Only "
    "outputs of blocks were compensated. Quantize with bias_compensation=True in the toolkit, or "
    "pass the trained model before it was rounded, to compensate linears, too."
)


def about_experts(changed: Sequence[str]) -> str:
    """That the routed experts with these paths are left to their blocks."""
    return (
        f"{len(changed)} weights of routed experts, the first is {changed[0]}, have no vectors of "
        "their own: the quantized model routes other tokens to them. The vectors of their blocks "
        "stand for them, where blocks are compensated."
    )
