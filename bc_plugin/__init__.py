"""Bias compensation for quantized models, inside the toolkits that quantize them."""

from .compensate import compensate
from .config import BiasCompensationConfig
from .enable import disable, enable, enabled
from .errors import BiasCompensationError
from .evaluate import Evaluation, evaluate
from .export import export
from .refine import record_float_logits, refine
from .refinement.config import RefinementConfig
from .refinement.float_logits import FloatLogits
from .vectors.card import write_card
from .vectors.compensation import Compensation

__all__ = [
    "BiasCompensationConfig",
    "BiasCompensationError",
    "Compensation",
    "Evaluation",
    "FloatLogits",
    "RefinementConfig",
    "compensate",
    "disable",
    "enable",
    "enabled",
    "evaluate",
    "export",
    "record_float_logits",
    "refine",
    "write_card",
]
