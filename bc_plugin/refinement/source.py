"""The float model that vectors are trained against, in whichever form it is given."""

from __future__ import annotations

from torch import nn

from ..errors import BiasCompensationError
from ..models.float_blocks import BlockSnapshot
from .checksums import model_checksum, snapshot_checksum
from .config import RefinementConfig
from .data import RefinementData
from .float_logits import FloatLogits

Source = nn.Module | FloatLogits | BlockSnapshot


def check_source(source: Source, data: RefinementData, config: RefinementConfig) -> None:
    """Make sure that vectors can be trained against it.

    Raises:
        BiasCompensationError: it does not tell what is compared, or was recorded for other data.
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


def source_checksum(source: Source) -> str:
    """A fingerprint of the float model; what it predicted has the fingerprint of the model."""
    if isinstance(source, FloatLogits):
        return source.float_model
    return (
        snapshot_checksum(source) if isinstance(source, BlockSnapshot) else model_checksum(source)
    )
