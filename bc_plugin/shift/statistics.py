"""The shift of one site: its mean, and the error with and without compensation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import BiasCompensationError
from ..models.calls import BlockCalls
from ..models.positions import site_index, vector_rows
from ..models.rows import sums_by_row
from .agreement import BLOCK, EACH, LINEAR, Agreement


class Site:
    """Statistics of one site on the tokens its vectors are fitted to, and on those held out.

    Args:
        name: The module's path.
        kind: ``"linear"``, ``"block"`` or ``"convolution"``.
        positions: Number of leading positions with a vector of their own.
    """

    def __init__(self, name: str, kind: str, positions: int) -> None:
        self.name, self.kind, self.positions = name, kind, positions
        self.fitted, self.apart = ShiftStatistics(positions), ShiftStatistics(positions)
        self.agreement = Agreement(BLOCK if kind == "block" else LINEAR)

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
        index = site_index(
            self.name, self.positions, reference.shape[:-1], batch.index, batch.context
        )
        index = index.to(output.device).flatten()
        rows = vector_rows(index, self.positions)
        keep = index >= 0
        given = batch.hidden if self.kind == "block" else None
        self.add(reference, output, rows, None if bool(keep.all()) else keep, batch.apart, given)

    def add(
        self,
        reference: Tensor,
        output: Tensor,
        rows: Tensor,
        keep: Tensor | None,
        apart: bool,
        given: Tensor | None = None,
    ) -> None:
        """Add tokens.

        Args:
            reference: Output of the float module, (..., features).
            output: Output of the quantized module, same shape.
            rows: int64 (tokens,), the row of each token.
            keep: bool (tokens,), False for padding; None when there is none.
            apart: Whether they are kept apart for measuring.
            given: The input of a block.
        """
        if reference.shape != output.shape:
            raise BiasCompensationError(
                f"the float model's {self.name} gives {tuple(reference.shape)}, the quantized "
                f"one {tuple(output.shape)}; compensation needs two models of the same shapes."
            )
        statistics = self.apart if apart else self.fitted
        reference, output = reference.flatten(0, -2), output.flatten(0, -2)
        statistics.update(reference, output, rows, keep)
        if not (apart or self.agreement.is_full):
            self._agree(reference, output, rows, keep, given)

    @property
    def statistics(self) -> tuple[Any, ...]:
        """Everything that is summed up."""
        return self.fitted, self.apart, self.agreement.together, self.agreement.channels

    def _agree(
        self,
        reference: Tensor,
        output: Tensor,
        rows: Tensor,
        keep: Tensor | None,
        given: Tensor | None,
    ) -> None:
        """Compare some tokens, spread over the batch.

        Not the first where it has a row of its own: beside an attention sink nothing else is seen.
        """
        chosen = rows >= min(self.positions, 1)
        chosen = (chosen if keep is None else chosen & keep).nonzero().squeeze(1)
        chosen = chosen[:: len(chosen) // EACH + 1]
        wide = torch.promote_types(output.dtype, torch.float32)
        values = [reference[chosen], output.to(wide)[chosen] - reference[chosen]]
        if given is not None and given.numel() == reference.numel():
            values.append(given.to(chosen.device).reshape(reference.shape)[chosen])
        self.agreement.update(torch.stack([value.to(values[1]) for value in values]))


class ShiftStatistics:
    """Running sums of the shift ``output - reference`` of one site, in float64.

    The mean shift is what compensation takes away: ``b* = argmin_b E||y - (q + b)||^2 = E[y - q]``
    (Gong et al., arXiv 2404.01892, after the bias correction of Nagel et al., arXiv 1906.04721).
    Each of the first ``positions`` tokens of a sequence has a mean of its own; all later tokens
    share one, the last row.

    Args:
        positions: Number of leading positions with a row of their own.
    """

    SUMS = ("count", "total", "squares")

    def __init__(self, positions: int) -> None:
        self.positions = positions
        self.count = torch.zeros(positions + 1, dtype=torch.float64)
        self.total: Tensor | None = None
        self.squares = 0.0

    def update(self, reference: Tensor, output: Tensor, rows: Tensor, keep: Tensor | None) -> None:
        """Add the tokens of one batch.

        Args:
            reference: Output of the float module, (tokens, features).
            output: Output of the quantized module, same shape.
            rows: int64 (tokens,), the row of each token.
            keep: bool (tokens,), False for padding; None when there is none.
        """
        wide = torch.promote_types(output.dtype, torch.float32)
        # Not in place: tensors that wrap others (optimum-quanto's) would stay what they are.
        shift = output.to(wide) - reference
        if keep is not None:
            shift, rows = shift[keep], rows[keep]
        found = sums_by_row(shift, rows, self.positions)
        self.total = found if self.total is None else self.total + found
        self.count += torch.bincount(rows, minlength=self.positions + 1).cpu()
        flat = shift.flatten()
        self.squares += torch.dot(flat, flat).item()

    @property
    def tokens(self) -> float:
        """Number of tokens seen."""
        return self.count.sum().item()

    def vectors(self) -> Tensor:
        """The compensation: minus the mean shift, float64 (positions + 1, features).

        A last row that no token reached, as with ``positions="all"``, takes the mean over every
        position but the first, the attention sink.
        """
        count = self.count.to(self.total.device)
        vectors = -self.total / count.clamp(min=1)[:, None]
        if count[-1] == 0:
            later = slice(1, None) if len(count) > 2 else slice(None)
            vectors[-1] = -self.total[later].sum(0) / count[later].sum()
        return vectors

    def error(self, vectors: Tensor | None = None) -> float:
        """Mean squared error per value over the tokens seen, with ``vectors`` added or without.

        Without a second pass: n shifts of mean m, with b added to each, have the squared sum of
        their spread around m and of ``n |m + b|^2``. Neither of the two is negative, whereas the
        change of the squared sum, ``2 b.s + n b.b``, may take more from it than rounding left.
        """
        squares = self.squares
        if vectors is not None:
            count = self.count.to(self.total.device)[:, None]
            mean = self.total / count.clamp(min=1)
            spread = squares - (count * mean.square()).sum().item()
            left = (count * (mean + vectors.to(self.total)).square()).sum().item()
            squares = max(spread, 0.0) + left
        return squares / (self.tokens * self.total.shape[1])
