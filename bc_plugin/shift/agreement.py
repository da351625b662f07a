"""Whether a quantized module still says what the float one says.

Errors alone do not tell: rounding activations may leave an error of many times the output's own
variance, and moved scales one of a tenth. What tells is how the two outputs vary together.

- Correlation. Rounding leaves outputs that vary as the float ones do; another checkpoint's, or
  those of rotated weights, do not. Measured on SmolLM2-135M, down to one bit and with inputs
  rounded to 4 bits per tensor: at least 0.30 for linears and 0.17 for blocks. With rotated weights
  or rows in another order: about 0 for most linears, 0.02 at most for blocks.
- A factor for each channel. Where scales were moved from one linear into the next, a channel varies
  as its float one does, but by a factor of its own. The part of the shift's variance that such
  factors explain, less the part that any other channels explain: at most 0.05 after rounding to 2
  bits or more, 0.22 below; 0.73 and more after scales between 0.8 and 1.25 were moved and weights
  rounded to 4 bits, 0.4 after 0.5 to 2 and 2 bits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LINEAR = 0.2  # the least correlation of a linear or a convolution
BLOCK = 0.1  # of a block
FACTORS = 0.3  # the most that factors may explain
FEW, ENOUGH = 32, 512  # tokens: fewer tell nothing, and more tell nothing new
EACH = 128  # of one batch
AT_ONCE = 16  # in float64, of which there are many copies


class Covariances:
    """Of each channel of several tensors with each other, over batches of tokens."""

    SUMS = ("tokens", "sums", "products")

    def __init__(self) -> None:
        self.tokens = 0
        self.sums: Tensor | None = None
        self.products: Tensor | None = None

    def update(self, values: Tensor) -> None:
        """Add ``values``, float64 (tensors, tokens, features)."""
        self.tokens += values.shape[1]
        sums = values.sum(1)
        # One by one: an einsum multiplies many tiny matrices, which takes three times as long.
        products = torch.stack([(values * one).sum(1) for one in values])
        self.sums = sums if self.sums is None else self.sums + sums
        self.products = products if self.products is None else self.products + products

    def matrix(self) -> Tensor:
        """The covariances, (tensors, tensors, features)."""
        mean = self.sums / self.tokens
        return self.products / self.tokens - mean[:, None] * mean


class Agreement:
    """How the outputs of one site in both models vary together.

    Args:
        least: The correlation below which the quantized module is another one.
    """

    def __init__(self, least: float) -> None:
        self.least = least
        self.together = Covariances()  # of the float output, its shift, and a block's input
        self.channels = Covariances()  # of the same two, and the float output of other channels

    @property
    def is_full(self) -> bool:
        """Whether more tokens would tell nothing new."""
        return self.together.tokens >= ENOUGH

    def update(self, values: Tensor) -> None:
        """Add tokens.

        Args:
            values: Output of the float module; output of the quantized module less that; and for
                a block, its input: (2 or 3, tokens, features).
        """
        for part in values[:, : ENOUGH - self.together.tokens].split(AT_ONCE, 1):
            self._add(part.double())

    def _add(self, values: Tensor) -> None:
        self.together.update(values)
        if len(values) == 2:
            # Each token counts the same here: beside an attention sink nothing else would.
            values = values / values[0].square().mean(1, keepdim=True).sqrt().clamp(min=1e-30)
            others = values[:1].roll(values.shape[-1] // 2, -1)
            self.channels.update(torch.cat([values, others]))

    def correlation(self) -> float:
        """Of the two outputs; of what a block's input does not explain of them, for a block.

        NaN where there is nothing to tell by: few tokens, or outputs that hardly vary.
        """
        if self.together.tokens < FEW:
            return math.nan
        among = self.together.matrix()
        if len(among) == 3:
            among = among - among[:, 2:] * among[2:] / among[2, 2].clamp(min=1e-30)
        reference, both, shift = (among[i, j].sum().item() for i, j in ((0, 0), (0, 1), (1, 1)))
        energy = self.together.products[0, 0].sum().item() / self.together.tokens
        quantized = reference + 2 * both + shift
        if reference <= 1e-5 * energy or quantized <= 1e-5 * reference:  # half precision's rounding
            return math.nan
        return (reference + both) / math.sqrt(reference * quantized)

    def factors(self) -> float:
        """The part of the shift's variance that is a factor for each channel, from 0 to 1.

        A factor that all channels have in common is none of them: coarse rounding shrinks outputs.
        """
        if self.channels.tokens < FEW:
            return 0.0
        among = self.channels.matrix()
        common = among[0, 1].sum() / among[0, 0].sum()
        shift = among[1, 1] - 2 * common * among[0, 1] + common**2 * among[0, 0]
        if not shift.sum() > 1e-6 * among[0, 0].sum():  # factors nearer to 1 than that are harmless
            return 0.0
        own, others = (
            ((among[i, 1] - common * among[i, 0]).square() / among[i, i].clamp(min=1e-30)).sum()
            for i in (0, 2)
        )
        return ((own - others) / shift.sum()).item()

    @property
    def is_missing(self) -> bool:
        """Whether the outputs do not stand for each other: another module's, or rescaled ones."""
        return self.correlation() < self.least or self.factors() > FACTORS
