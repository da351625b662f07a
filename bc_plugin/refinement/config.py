"""Settings of the refinement of vectors."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import Literal

from ..config import BY, TRAIN, Settings


@dataclass(frozen=True)
class RefinementConfig(Settings):
    """Settings of the refinement.

    Args:
        steps: Steps of the optimizer (Adam); with ``by="block"``, in each block.
        train: What is trained: any of ``"vectors"``, ``"scales"`` (of the quantized linears'
            groups) and ``"norms"`` (their gains and biases). Scales and norms are changed in the
            model's own tensors; integers and zero points never are. ``"auto"`` is all three, but
            for scales where they cannot be told from integers, and by block vectors alone.
        by: What is compared with the float model: ``"model"`` (next-token distributions) or
            ``"block"`` (outputs of blocks, least squares, one block in memory at a time).
        learning_rate: The largest change of a vector's values per step, as a share of their root
            mean square at the start, or of half that of the error they leave where that is less.
            Reached after the warm-up; a cosine takes it down to 0.
        scales_learning_rate, norms_learning_rate: The largest change per step, as a share of each
            value.
        warmup: Share of the steps in which the learning rate rises.
        batch_tokens: Tokens per forward pass.
        gradient_accumulation_steps: Forward passes per step.
        gradient_checkpointing: Compute activations twice, to keep only those between blocks.
        mixed_precision: ``"bf16"`` trains in bfloat16 where PyTorch's autocast would, several times
            faster on processors that have it; looks at held-out sequences are exact all the same.
        held_out: Share of the calibration sequences kept apart, to decide what is kept.
        evaluate_every: Steps between two looks at the held-out sequences.
        patience: Looks without an improvement after which training stops.
        top_k: Of every distribution the float model predicts, so many values are kept, and the
            rest as one; None for all of them.
        seed: Of the order of the batches.

    Raises:
        BiasCompensationError: a value is out of range.
    """

    what = "refinement"

    steps: int = 64
    train: tuple[str, ...] | Literal["auto"] = "auto"
    by: Literal["model", "block"] = "model"
    learning_rate: float = 0.025
    scales_learning_rate: float = 2.5e-4
    norms_learning_rate: float = 5e-4
    warmup: float = 0.1
    batch_tokens: int = 2048
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    mixed_precision: Literal["no", "bf16"] = "no"
    held_out: float = 0.125
    evaluate_every: int = 8
    patience: int = 4
    top_k: int | None = 512
    seed: int = 0

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "batch_tokens",
            "gradient_accumulation_steps",
            "evaluate_every",
            "patience",
        ):
            self._require_number(name, lambda n: n > 0, "a whole number above 0")
        self._require_some("train", TRAIN, or_auto=True)
        self._require(self.by in BY, "by", f"one of {BY}")
        precisions = ("no", "bf16")
        self._require(self.mixed_precision in precisions, "mixed_precision", f"one of {precisions}")
        self._require_bool("gradient_checkpointing")
        for name in ("learning_rate", "scales_learning_rate", "norms_learning_rate"):
            self._require_number(name, lambda n: n > 0, "above 0", Real)
        self._require_number("warmup", lambda n: 0 <= n <= 1, "a share from 0 to 1", Real)
        self._require_number("held_out", lambda n: 0 < n < 1, "a share above 0 and below 1", Real)
        if self.top_k is not None:
            self._require_number("top_k", lambda n: n > 0, "a whole number above 0, or None")
        self._require_number("seed", lambda n: n >= 0, "a whole number from 0 up")

    @property
    def kinds(self) -> tuple[str, ...]:
        """What ``train`` comes to, where all of it can be trained."""
        if self.train == "auto":
            return TRAIN if self.by == "model" else ("vectors",)
        return self.train
