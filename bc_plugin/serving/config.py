"""A compensated checkpoint's quantization config: the one that vLLM would have chosen, and more."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from types import SimpleNamespace
from typing import Any

from torch import nn
from vllm.config import ModelConfig
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.models.utils import WeightsMapper

from ..errors import BiasCompensationError
from ..names import KEY, SUFFIX
from ..supported import VLLM
from ..toolkits.flag import is_entry
from ..vectors.entry import FORMAT_VERSION
from ..vectors.fields import require_fields
from ..vectors.joint import saved_without
from ..vectors.sealed import unseal
from ..vectors.short_names import expand
from .loading import attach_when_loaded
from .methods import until_attached
from .refusals import naming_the_export


class BiasCompensationConfig(QuantizationConfig):
    """What vLLM asks whether a checkpoint is compensated; it never becomes an object."""

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Our name for a checkpoint with vectors; every other is somebody else's."""
        return KEY if is_entry(hf_quant_cfg.get(KEY)) else None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QuantizationConfig:
        """What vLLM would have made of the same checkpoint without vectors, told to expect them.

        Raises:
            BiasCompensationError: another version of vLLM or of the format, a damaged entry, or
                weights that vLLM has no kernels for.
        """
        VLLM.check(otherwise="")
        plain = unseal(config)
        entry = plain.pop(KEY)
        _require_vectors(entry)
        with naming_the_export():
            inner = get_quantization_config(_chosen_by_vllm(plain)).from_config(plain)
        inner.compensated_blocks = [n for s in entry["sites"].get("block", ()) for n in expand(s)]
        return compensated(inner)


class Compensated(QuantizationConfig):
    """What is added to a class of vLLM's quantization configs."""

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """The method vLLM has for the layer; a linear's refuses to run before it has vectors."""
        with naming_the_export():
            method = super().get_quant_method(layer, prefix)
        if isinstance(layer, LinearBase) and isinstance(method, LinearMethodBase):
            until_attached(method)
        return method

    def maybe_update_config(self, *args: Any, **kwargs: Any) -> None:
        """vLLM's own, which may take a block with a vector, and nothing else, for unquantized."""
        super().maybe_update_config(*args, **kwargs)
        skipped = getattr(self, "modules_to_not_convert", None)
        if skipped:
            blocks = set(self.compensated_blocks)
            self.modules_to_not_convert = [name for name in skipped if name not in blocks]

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:
        """Vectors are no parameters of vLLM's models; they are read once all else is in place."""
        ours = WeightsMapper(orig_to_new_suffix={SUFFIX: None})
        return super().get_checkpoint_weight_mapper() | ours

    def __reduce__(self) -> tuple:
        return _from_state, (type(self).__mro__[2], dict(vars(self)))


def compensated(config: QuantizationConfig) -> QuantizationConfig:
    """The same config, of a class that is its own and ``Compensated``."""
    config.__class__ = _compensated_class(type(config))
    attach_when_loaded()  # here, since every process that loads the model has such a config
    return config


@cache
def _compensated_class(kind: type[QuantizationConfig]) -> type[QuantizationConfig]:
    """Keeps the name, by which vLLM tells some apart."""
    return type(kind.__name__, (Compensated, kind), {"__module__": __name__})


def _from_state(kind: type[QuantizationConfig], state: dict[str, Any]) -> QuantizationConfig:
    """A config that was sent to another process, where its class has to be made."""
    config = kind.__new__(kind)
    vars(config).update(state)
    return compensated(config)


def _chosen_by_vllm(plain: dict[str, Any]) -> str:
    """The name of what vLLM itself chooses, in its own order, Marlin and the like included."""
    model = SimpleNamespace(
        quantization=None,
        model_arch_config=SimpleNamespace(quantization_config=plain),
        hf_config=None,
        allow_deprecated_quantization=False,
    )
    ModelConfig._verify_quantization(model)
    return model.quantization


def _require_vectors(entry: Mapping[str, Any]) -> None:
    """Make sure, before any weight is read, that an entry can be, and has vectors."""
    if saved_without(entry):
        raise BiasCompensationError(
            "this checkpoint was quantized jointly with vectors that it was saved without; attach "
            "them with bc_plugin.Compensation.attach and save it again, or compute them again "
            "with `bc-plugin compensate`."
        )
    require_fields(entry, FORMAT_VERSION)
