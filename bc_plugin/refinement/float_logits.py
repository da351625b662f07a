"""What the float model predicts, kept on disk, so that it need not be in memory later on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..errors import BiasCompensationError
from ..files import written_whole
from ..models.predictions import next_token_log_probabilities


class FloatLogits:
    """Next-token distributions of a float model for a list of batches.

    Of each distribution the ``top_k`` largest log-probabilities are kept; the mass of the rest
    follows from them. What is measured against it is the KL divergence with that rest taken as one
    outcome, which is at most the true one, and equal to it where ``top_k`` is the vocabulary.

    Args:
        folder: Where ``record`` wrote them.
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
    ) -> FloatLogits:
        """Run the float model on all batches and write what it predicts.

        Args:
            batches: ``{"input_ids", "attention_mask"}``, int64 of shape (batch, length).
            folder: A file per batch goes there; those written for the same batch are kept.
            top_k: Log-probabilities kept per token; None for all.
        """
        found = cls(folder)
        for number, batch in enumerate(tqdm(batches, desc="Float logits", leave=False)):
            if found._has(number, batch, top_k):
                continue
            log_p = next_token_log_probabilities(model, batch)
            kept, index = log_p.topk(min(top_k or log_p.shape[-1], log_p.shape[-1]))
            tensors = {
                "log_p": kept.cpu(),
                "index": index.int().cpu(),
                "input_ids": batch["input_ids"].cpu().contiguous(),
            }
            with written_whole(found._path(number)) as part:
                save_file(tensors, part, metadata={"top_k": str(top_k)})
        return found

    def check(self, batches: Sequence[Mapping[str, Any]], top_k: int | None) -> None:
        """Make sure that they were recorded for these batches.

        Raises:
            BiasCompensationError: one is missing, or was recorded for other tokens.
        """
        for number, batch in enumerate(batches):
            if not self._has(number, batch, top_k):
                raise BiasCompensationError(
                    f"{self.folder} does not hold what the float model predicts for batch {number} "
                    f"of {len(batches)} with top_k={top_k}; record it with "
                    "bc_plugin.record_float_logits from the same calibration data and settings."
                )

    def _has(self, number: int, batch: Mapping[str, Any], top_k: int | None) -> bool:
        path = self._path(number)
        if not path.is_file():
            return False
        with safe_open(path, "pt") as file:
            same_k = (file.metadata() or {}).get("top_k") == str(top_k)
            return same_k and torch.equal(file.get_tensor("input_ids"), batch["input_ids"].cpu())

    def _path(self, number: int) -> Path:
        return self.folder / f"batch-{number}.safetensors"

    def divergence(self, number: int, log_q: Tensor) -> Tensor:
        """KL divergence from the float model's distributions, in nats, summed over tokens.

        Args:
            number: The batch's place among those recorded.
            log_q: The other model's log-probabilities, (tokens, vocabulary).
        """
        tensors = load_file(self._path(number), device=str(log_q.device))
        log_p, index = tensors["log_p"], tensors["index"].long()
        chosen = log_q.gather(-1, index)
        divergence = (log_p.exp() * (log_p - chosen)).sum()
        if index.shape[-1] < log_q.shape[-1]:
            rest_p, rest_q = _log_rest(log_p), _log_rest(chosen)
            divergence = divergence + (rest_p.exp() * (rest_p - rest_q)).sum()
        return divergence


def _log_rest(log_p: Tensor) -> Tensor:
    """Log of the mass that is not among ``log_p``."""
    tiny = torch.finfo(torch.float32).eps
    return torch.log1p(-log_p.exp().sum(-1).clamp(max=1 - tiny))
