"""What the float model predicts, kept on disk, so that it need not be in memory later on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..errors import BiasCompensationError
from ..models.predictions import next_token_log_probabilities
from ..ranks import place, wait_for_all
from .checksums import checksum, model_checksum
from .disk import reading, written_to
from .divergence import Divergence
from .embeddings import embeddings_sample

T = TypeVar("T")

FORMAT = "3"  # of the files; those of before are written anew
BATCHES = "batch-*.safetensors"


class FloatLogits:
    """Next-token distributions of a float model for a list of batches.

    Of each distribution the ``top_k`` largest log-probabilities are kept; the mass of the rest
    follows from them. What is measured against it is the KL divergence with that rest taken as one
    outcome, which is at most the true one, and equal to it where ``top_k`` is the vocabulary.

    Args:
        folder: Where ``record`` wrote them; one that all ranks see.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    @classmethod
    @torch.no_grad()
    def record(
        cls,
        model: nn.Module,
        batches: Sequence[Mapping[str, Any]],
        folder: str | Path,
        top_k: int | None,
        float_model: str | None = None,
    ) -> FloatLogits:
        """Run the float model on all batches and write what it predicts.

        Ranks take turns with the batches, which all of them are given.

        Args:
            batches: ``{"input_ids", "attention_mask"}``, int64 of shape (batch, length).
            folder: A file per batch goes there; those written from the same model for the same
                batch are kept, others are replaced.
            top_k: Log-probabilities kept per token; None for all.
            float_model: The model's ``model_checksum``, where it is known.

        Raises:
            BiasCompensationError: a file there is damaged, or cannot be written.
        """
        found = cls(folder)
        float_model = float_model or model_checksum(model)
        embeddings = embeddings_sample(model)
        for number, batch in _in_turn(tqdm(batches, desc="Float logits", leave=False)):
            wanted = _origin(batch, top_k) | {"float_model": float_model}
            if found._holds(number, wanted):
                continue
            log_p = next_token_log_probabilities(model, batch)
            kept, index = log_p.topk(min(top_k or log_p.shape[-1], log_p.shape[-1]))
            tensors = {"log_p": kept.cpu(), "index": index.int().cpu(), "embeddings": embeddings}
            metadata = wanted | {"checksum": checksum(tensors)}
            with written_to(found._path(number)) as part:
                save_file(tensors, part, metadata=metadata)
        wait_for_all()
        return found

    @property
    def float_model(self) -> str:
        """The ``model_checksum`` of the model that made the predictions."""
        return self._metadata(0).get("float_model", "")

    @property
    def embeddings(self) -> Tensor:
        """The ``embeddings_sample`` of that model."""
        return self._read(0)["embeddings"]

    def check(self, batches: Sequence[Mapping[str, Any]], top_k: int | None) -> None:
        """Make sure that they were recorded for these batches, all from one model.

        Raises:
            BiasCompensationError: one is missing or damaged, or was recorded for other tokens or
                masks, or from another model than the first.
        """
        for number, batch in _in_turn(batches):
            wanted = _origin(batch, top_k)
            if number:
                wanted["float_model"] = self.float_model
            if not self._holds(number, wanted):
                raise BiasCompensationError(
                    f"{self.folder} does not hold what the float model predicts for batch {number} "
                    f"of {len(batches)} with top_k={top_k}; record it with "
                    "bc_plugin.record_float_logits from the same calibration data and settings."
                )

    def _holds(self, number: int, wanted: Mapping[str, str]) -> bool:
        """Whether a batch's file is there, as it is wanted, and whole."""
        if not self._path(number).is_file():
            return False
        metadata = self._metadata(number)
        if any(metadata.get(key) != value for key, value in wanted.items()):
            return False
        tensors = self._read(number)
        with self._reading(number):
            if checksum(tensors) != metadata["checksum"]:
                raise ValueError("its checksum is another")
        return True

    def _path(self, number: int) -> Path:
        return self.folder / BATCHES.replace("*", str(number))

    def _reading(self, number: int) -> AbstractContextManager[None]:
        return reading(self._path(number), "what the float model predicts is recorded again")

    def _metadata(self, number: int) -> dict[str, str]:
        with self._reading(number), safe_open(self._path(number), "pt") as file:
            return file.metadata() or {}

    def _read(self, number: int) -> dict[str, Tensor]:
        with self._reading(number), safe_open(self._path(number), "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def divergence(self, number: int, logits: Tensor, rows: Tensor, first: int = 0) -> Tensor:
        """KL divergence from the float model's distributions, in nats, summed over tokens.

        Args:
            number: The batch's place among those recorded.
            logits: The other model's for some sequences of it, (batch, length, vocabulary).
            rows: Of the flattened logits, those that count, int64 (tokens,).
            first: Tokens that count in the sequences before.
        """
        kept, part = self._read(number), slice(first, first + len(rows))
        log_p, index = (kept[name][part].to(logits.device) for name in ("log_p", "index"))
        return Divergence.apply(logits, rows.to(logits.device), log_p, index.long())


def _in_turn(batches: Iterable[T]) -> Iterator[tuple[int, T]]:
    """This rank's batches, with their numbers."""
    rank, ranks = place()
    return islice(enumerate(batches), rank, None, ranks)


def _origin(batch: Mapping[str, Any], top_k: int | None) -> dict[str, str]:
    """What predictions are for, as a file's metadata has it."""
    return {"format_version": FORMAT, "batch": checksum(batch), "top_k": str(top_k)}
