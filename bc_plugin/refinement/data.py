"""Calibration sequences for the refinement, some of them held out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ..calibration.batches import rebatch, split_held_out
from ..errors import BiasCompensationError
from .config import RefinementConfig


class RefinementData:
    """Calibration sequences in batches, some of them held out.

    Attributes:
        batches: Those that are trained on, then those held out.
        fitted, apart: Their numbers.

    Raises:
        BiasCompensationError: there are fewer than two sequences, or they are not text.
    """

    def __init__(self, calibration: Iterable[Any], config: RefinementConfig) -> None:
        kept, others = split_held_out(list(calibration), config.held_out)
        if not others:
            raise BiasCompensationError(
                "refinement needs at least two calibration sequences, one to be held out."
            )
        fitted = rebatch(kept, config.batch_tokens)
        batches = fitted + rebatch(others, config.batch_tokens)
        self.batches = [{"input_ids": b} if isinstance(b, Tensor) else b for b in batches]
        self.fitted = range(len(fitted))
        self.apart = range(len(fitted), len(batches))
        if not all("input_ids" in batch for batch in self.batches):
            raise BiasCompensationError(
                "the calibration data has no input_ids; refinement is for language models."
            )
