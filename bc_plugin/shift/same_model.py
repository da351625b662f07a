"""Whether two models can be a float model and what was quantized from it, before anything runs."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..errors import BiasCompensationError
from ..models.blocks import Blocks, find_block_lists
from ..models.float_blocks import BlockSnapshot
from ..models.modules import device_of, linears_of

# Settings that change what the same weights compute, and the width of what passes between blocks.
# Running the models compares other sizes; names, types, special tokens, dropout and the like may
# differ.
SETTINGS = re.compile(
    r"model_type|hidden_size|n_heads?|num_.*heads|head_dim|rope_.*|.*rotary.*|.*_eps|.*_epsilon|hidden_act"
    r"|hidden_activation|activation_function|sliding_window|layer_types|.*_softcapping"
    r"|.*_multiplier|logits?_scal(e|ing)|query_pre_attn_scalar|num_experts_per_tok|norm_topk_prob"
    r"|routed_scaling_factor"
)


def require_model(float_model: Any) -> bool:
    """Refuse what is no float model, or one without weights; whether it is a model that runs.

    Raises:
        BiasCompensationError: it is none.
    """
    if not isinstance(float_model, (nn.Module, BlockSnapshot)):
        raise BiasCompensationError(
            f"the float model is of type {type(float_model).__name__}; expected a model that "
            "transformers loads (AutoModelForCausalLM.from_pretrained)."
        )
    if isinstance(float_model, nn.Module) and device_of(float_model).type == "meta":
        raise BiasCompensationError(
            "the float model is on the meta device, where there are no weights; load it with "
            "from_pretrained."
        )
    return isinstance(float_model, nn.Module)


def require_same_model(model: nn.Module, float_model: nn.Module, lists: Sequence[Blocks]) -> None:
    """Refuse a float model that the quantized model cannot have been quantized from.

    Args:
        lists: Where the quantized model's blocks are.

    Raises:
        BiasCompensationError: the numbers of blocks differ, or settings that change what the
            weights compute, or the float model is the one that is quantized.
    """
    if find_block_lists(float_model, [blocks.path for blocks in lists]) != tuple(lists):
        raise BiasCompensationError("the two models have different numbers of blocks.")
    for name in (name for blocks in lists for name in blocks.names):
        block = model.get_submodule(name)
        others = dict(block.named_modules())
        for path, linear in linears_of(float_model.get_submodule(name)):
            if not _is_float(linear) and _is_float(others.get(path)):
                raise BiasCompensationError(
                    f"{name}.{path} is quantized in the float model and not in the quantized one; "
                    "pass the quantized model first, then the float model it came from."
                )
    for name, ours, theirs in _differences(_settings(model), _settings(float_model)):
        raise BiasCompensationError(
            f"the quantized model's config has {name}={ours!r}, the float model's {theirs!r}; "
            "compensation needs the float model that was quantized: the same modules' names and "
            "settings. Load that checkpoint, or mend the config that is wrong."
        )


def _is_float(linear: nn.Module | None) -> bool:
    weight = getattr(linear, "weight", None)
    if not isinstance(weight, Tensor) or is_traceable_wrapper_subclass(weight):
        return False
    return weight.is_floating_point() and weight.element_size() > 1


def _settings(model: nn.Module) -> Mapping[str, Any]:
    config = getattr(model, "config", None)
    return config.to_dict() if hasattr(config, "to_dict") else {}


def _differences(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], within: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Name and both values of settings that both have and that differ.

    None means a default, which may be what the other has in words.
    """
    for key in (key for key in ours if key in theirs):
        name, one, other = f"{within}{key}", ours[key], theirs[key]
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            if key != "quantization_config":
                yield from _differences(one, other, f"{name}.")
        elif one is None or other is None or not _matters(name):
            continue
        elif not _equal(one, other):
            yield name, one, other


def _matters(name: str) -> bool:
    return any(SETTINGS.fullmatch(part) for part in name.split("."))


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, (int, float)) and isinstance(other, (int, float)):
        return math.isclose(one, other, rel_tol=1e-3)  # GGUF has single precision
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_equal, one, other))
    return one == other
