"""Bias compensation for quantized models, inside the toolkits that quantize them."""

from .compensate import compensate
from .compensation import Compensation
from .config import BiasCompensationConfig
from .errors import BiasCompensationError
from .evaluate import Evaluation, evaluate
from .export import export
from .patching import disable, enable, enabled

__all__ = [
    "BiasCompensationConfig",
    "BiasCompensationError",
    "Compensation",
    "Evaluation",
    "compensate",
    "disable",
    "enable",
    "enabled",
    "evaluate",
    "export",
]
