"""Calibration sequences for the refinement, some of them held out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..calibration.batches import rebatch, split_held_out
from ..errors import BiasCompensationError
from ..ranks import are_several, gathered, part_of, place
from .config import RefinementConfig


class RefinementData:
    """Calibration sequences in batches, some of them held out.

    Of several ranks each gives its share of the sequences. All of them know all batches, which are
    those of one process, and each works on a part of every batch: whatever the number of ranks,
    a step is of the same sequences.

    Attributes:
        batches: Those that are trained on, then those held out.
        fitted, apart: Their numbers.
        parts: By number of a batch, which of its sequences are this rank's; without the batches of
            which it has none.

    Raises:
        BiasCompensationError: there are fewer than two sequences, or they are not text.
    """

    def __init__(self, calibration: Iterable[Any], config: RefinementConfig) -> None:
        kept, others = map(_of_all, split_held_out(list(calibration), config.held_out))
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
        parts = {number: _part(number, batch) for number, batch in enumerate(self.batches)}
        self.parts = {n: part for n, part in parts.items() if part.start < part.stop}

    def part(self, number: int) -> dict[str, Any]:
        """This rank's sequences of a batch."""
        return _sequences(self.batches[number], self.parts[number])

    def before(self, number: int) -> dict[str, Any]:
        """The sequences of a batch in front of this rank's."""
        return _sequences(self.batches[number], slice(self.parts[number].start))


def _of_all(items: Sequence[Any]) -> list[Any]:
    """Every rank's items, in order of the ranks."""
    if not are_several():
        return list(items)
    on_cpu = [{k: v.cpu() if isinstance(v, Tensor) else v for k, v in i.items()} for i in items]
    return [item for share in gathered(on_cpu) for item in share]


def _part(number: int, batch: Mapping[str, Any]) -> slice:
    """Which of a batch's sequences are this rank's; all or none where it cannot be divided."""
    count = len(batch["input_ids"])
    if {len(value) for value in batch.values() if isinstance(value, Tensor)} == {count}:
        return part_of(count, number)
    rank, ranks = place()
    return slice(0, count if number % ranks == rank else 0)


def _sequences(batch: Mapping[str, Any], part: slice) -> dict[str, Any]:
    if part == slice(0, len(batch["input_ids"])):
        return dict(batch)
    return {key: v[part] if isinstance(v, Tensor) else v for key, v in batch.items()}
