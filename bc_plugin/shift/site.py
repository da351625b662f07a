"""The statistics of one site while the pass runs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import BiasCompensationError
from ..models.calls import BlockCalls
from ..models.positions import vector_rows
from .statistics import ShiftStatistics


class Site:
    """Statistics of one site on the tokens its vectors are fitted to, and on those held out.

    Args:
        name: The module's path.
        kind: ``"linear"``, ``"block"`` or ``"convolution"``.
        positions: Number of leading positions with a vector of their own.
    """

    def __init__(self, name: str, kind: str, positions: int) -> None:
        self.name, self.kind, self.positions = name, kind, positions
        self.fitted, self.held_out = ShiftStatistics(positions), ShiftStatistics(positions)

    def update(self, batch: BlockCalls, reference: Tensor, output: Tensor) -> None:
        """Add a batch of a site within a block.

        Args:
            batch: What the block is given.
            reference: Output of the float module, of shape (batch, length, features), or with the
                first two flattened, as OPT does.
            output: Output of the quantized module, of the same shape.

        Raises:
            BiasCompensationError: the shapes differ, or are those of tokens whose positions, or
                whose padding, are unknown.
        """
        index = self._index(batch, reference.shape[:-1]).to(output.device).flatten()
        rows = vector_rows(index, self.positions)
        keep = index >= 0
        self.add(reference, output, rows, None if bool(keep.all()) else keep, batch.held_out)

    def _index(self, batch: BlockCalls, tokens: torch.Size) -> Tensor:
        """The index of every token of the site, as in ``BlockCalls``."""
        own, context = batch.index, batch.context
        if tokens == own.shape or tokens == (own.numel(),):
            if context is not None and own.shape == context.shape:
                self._require_equal(own, context)
            return own
        if self.positions:
            raise BiasCompensationError(
                f"{self.name} gives tokens of shape {tuple(tokens)} where its block has "
                f"{tuple(own.shape)}, as in windowed or cross-attention, so their positions are "
                "unknown. Compensate with positions=0, or only blocks with sites='block'."
            )
        if context is not None and tokens == context.shape:
            return context
        # Windows, or a table of relative positions (Swin v2). A single dimension holds the tokens
        # routed to an expert, which are others in the quantized model.
        if len(tokens) > 1 and not bool((own < 0).any()):
            return torch.zeros(tokens, dtype=torch.int64, device=own.device)
        raise BiasCompensationError(
            f"expected outputs of shape {tuple(own.shape)} + (features,) from {self.name}; it "
            f"gives {tuple(tokens)} + (features,), of which it is unknown what is padding."
        )

    def _require_equal(self, own: Tensor, context: Tensor) -> None:
        rows = [vector_rows(index, self.positions) for index in (own, context)]
        if not torch.equal(*rows) or not torch.equal(own < 0, context < 0):
            raise BiasCompensationError(
                f"{self.name}: as many tokens are attended to across as there are, but padded "
                "differently, so whose tokens a site gives is unknown. Calibrate without padding."
            )

    def add(
        self, reference: Tensor, output: Tensor, rows: Tensor, keep: Tensor | None, held_out: bool
    ) -> None:
        """Add tokens.

        Args:
            reference: Output of the float module, (..., features).
            output: Output of the quantized module, same shape.
            rows: int64 (tokens,), the row of each token.
            keep: bool (tokens,), False for padding; None when there is none.
            held_out: Whether they are kept apart for measuring.
        """
        if reference.shape != output.shape:
            raise BiasCompensationError(
                f"the float model's {self.name} gives {tuple(reference.shape)}, the quantized "
                f"one {tuple(output.shape)}; compensation needs two models of the same shapes."
            )
        statistics = self.held_out if held_out else self.fitted
        statistics.update(reference.flatten(0, -2), output.flatten(0, -2), rows, keep)
