"""Parts of a block that mix tokens by a convolution along the sequence, not by attention."""

from __future__ import annotations

from torch import nn

from .modules import is_linear


def convolved_linears(block: nn.Module) -> set[str]:
    """Paths, within the block, of the linears that stand beside such a convolution.

    State-space layers and linear attention (Mamba, Qwen3-Next) take padding out of what they are
    given, but not out of what their linears make of it. A vector added there would go into the
    state as if padding were tokens, so these linears have none; the block's vectors stand for them.
    """
    return {
        f"{path}.{name}" if path else name
        for path, module in block.named_modules()
        if any(isinstance(child, nn.Conv1d) for child in module.children())
        for name, child in module.named_children()
        if is_linear(child)
    }
