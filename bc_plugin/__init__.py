"""Bias compensation for quantized models, inside the toolkits that quantize them.

Public names are imported when they are first asked for: the command line answers a slip in an
argument before it waits for torch.
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .compensate import compensate
    from .config import BiasCompensationConfig
    from .enable import disable, enable, enabled
    from .errors import BiasCompensationError
    from .evaluate import Evaluation, evaluate
    from .export import export
    from .plan import Plan, plan
    from .ranks import together
    from .refine import record_float_logits, refine
    from .refinement.config import RefinementConfig
    from .refinement.float_logits import FloatLogits
    from .vectors.card import write_card
    from .vectors.compensation import Compensation

__version__ = "0.1.0"
__all__ = [
    "BiasCompensationConfig",
    "BiasCompensationError",
    "Compensation",
    "Evaluation",
    "FloatLogits",
    "Plan",
    "RefinementConfig",
    "compensate",
    "disable",
    "enable",
    "enabled",
    "evaluate",
    "export",
    "plan",
    "record_float_logits",
    "refine",
    "together",
    "write_card",
]
_MODULES = {  # of those whose module has another name
    "BiasCompensationConfig": "config",
    "BiasCompensationError": "errors",
    "Compensation": "vectors.compensation",
    "Evaluation": "evaluate",
    "FloatLogits": "refinement.float_logits",
    "Plan": "plan",
    "RefinementConfig": "refinement.config",
    "disable": "enable",
    "enabled": "enable",
    "record_float_logits": "refine",
    "together": "ranks",
    "write_card": "vectors.card",
}


def __getattr__(name: str) -> Any:
    if name in __all__:
        module = import_module(f".{_MODULES.get(name, name)}", __name__)
        globals()[name] = getattr(module, name)
        return globals()[name]
    if not name.startswith("_") and find_spec(f"{__name__}.{name}"):  # bc_plugin.calibration
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Importing ``bc_plugin.compensate``, the file, leaves that name to the function."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
