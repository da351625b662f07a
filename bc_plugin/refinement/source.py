"""The float model that vectors are trained against, in whichever form it is given."""

from __future__ import annotations

from torch import Tensor, nn

from ..errors import BiasCompensationError
from ..models.float_blocks import BlockSnapshot
from ..vectors.compensation import Compensation
from .checksums import model_checksum, snapshot_checksum
from .config import RefinementConfig
from .data import RefinementData
from .embeddings import LEAST, agreement, embeddings_sample
from .float_logits import FloatLogits

Source = nn.Module | FloatLogits | BlockSnapshot


def check_source(
    source: Source, model: nn.Module, data: RefinementData, config: RefinementConfig
) -> None:
    """Make sure that the vectors of ``model`` can be trained against it.

    Raises:
        BiasCompensationError: it does not tell what is compared, was recorded for other data, or
            is not the model that was quantized.
    """
    kind = type(source).__name__
    if config.by == "block" and not isinstance(source, (nn.Module, BlockSnapshot)):
        raise BiasCompensationError(
            f'by="block" compares blocks with those of the float model; pass that, not a {kind}.'
        )
    if config.by == "model" and not isinstance(source, (nn.Module, FloatLogits)):
        raise BiasCompensationError(
            f"a {kind} cannot tell what the float model predicts; pass the float model, or what "
            "bc_plugin.record_float_logits wrote."
        )
    if isinstance(source, FloatLogits):
        source.check(data.batches, config.top_k)
        _require_embeddings(model, source.embeddings, f"{source.folder} was recorded from")
    if isinstance(source, nn.Module):
        _require_embeddings(model, embeddings_sample(source), "the float model is")


def require_float(model: nn.Module) -> None:
    """Refuse a float model that is compensated.

    Raises:
        BiasCompensationError: it is.
    """
    if Compensation.attached_to(model) is not None:
        raise BiasCompensationError(
            "the float model has compensation vectors attached; pass the compensated model first, "
            "then the float model it came from."
        )


def _require_embeddings(model: nn.Module, theirs: Tensor, whose: str) -> None:
    found = agreement(embeddings_sample(model), theirs)
    if found < LEAST:
        raise BiasCompensationError(
            f"{whose} another model than the one that was quantized: values of the input "
            f"embeddings, which quantizing leaves as they are, agree by {found:.2f} instead of 1. "
            "Pass the float model of the same checkpoint."
        )


def source_checksum(source: Source) -> str:
    """A fingerprint of the float model; what it predicted has the fingerprint of the model."""
    if isinstance(source, FloatLogits):
        return source.float_model
    return (
        snapshot_checksum(source) if isinstance(source, BlockSnapshot) else model_checksum(source)
    )
