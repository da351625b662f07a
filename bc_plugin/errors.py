"""The one error this package raises on purpose."""


class BiasCompensationError(RuntimeError):
    """Compensation cannot be computed, attached, saved or loaded correctly.

    The message says what went wrong, where, and what to do. It is deliberately not a
    ``ValueError``: Optimum's calibration loop swallows those.
    """
