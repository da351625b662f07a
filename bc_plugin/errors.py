"""The one error this package raises on purpose."""

from __future__ import annotations

from typing import Any


class BiasCompensationError(RuntimeError):
    """Compensation cannot be computed, attached, saved or loaded correctly.

    The message says what went wrong, where, and what to do. It is deliberately not a
    ``ValueError``: Optimum's calibration loop swallows those.

    Attributes:
        model: The quantized model, uncompensated, where a toolkit had quantized it by then.
    """

    model: Any = None
