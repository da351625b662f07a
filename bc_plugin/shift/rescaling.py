"""What AWQ does to a block before it rounds: it moves scales from one module into another.

The input channels of some linears are multiplied by scales, and whatever feeds them is divided by
the same: a norm, an activation, or the output channels of another linear. The output of that other
linear then no longer stands for the float linear's. The toolkit's own list of scales, recorded as
it is applied, tells which linears these are.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn


class Rescaling:
    """The scales that were moved within one block.

    Attributes:
        inputs: For linears, by path in the block: what their inputs are divided by, (in_features,).
        outputs: Paths of linears whose outputs are divided by something.
    """

    def __init__(self) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.outputs: set[str] = set()

    def add(self, block: nn.Module, scales: Iterable[tuple[Any, ...]]) -> None:
        """Take note of a list of (fed by, linears, scales, ...) as toolkits apply it."""
        for source, linears, values, *_ in scales:
            if isinstance(block.get_submodule(source), nn.Linear):
                self.outputs.add(source)
            values = values.detach().cpu().double().flatten()
            for linear in linears:
                self.inputs[linear] = self.inputs.get(linear, 1.0) * values

    def input_of(self, linear: str, inputs: Tensor) -> Tensor:
        """What the rescaled linear is given where the float linear is given ``inputs``."""
        scales = self.inputs.get(linear)
        return inputs if scales is None else inputs / scales.to(inputs)
