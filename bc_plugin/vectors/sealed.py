"""The quantization config of weights that are worth little without their vectors, in a file.

Weights that were quantized jointly with their vectors are ruined where a program loads them alone,
and programs pass over tensors and settings that they do not know. So what every loader checks, and
shows when it refuses it, says in files what the checkpoint needs, and the values are kept in the
entry. Configs of other checkpoints, and all of them in memory, stay as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from ..errors import BiasCompensationError
from ..names import KEY

VALUES = "sealed"
NEEDS = (
    "a checkpoint quantized jointly with its bias_compensation vectors, which only bc_plugin "
    "loads: call bc_plugin.enable() before loading, or start the program with "
    "`bc-plugin run -- COMMAND`; without them it is worth nothing"
)
# By the method, what is written instead of which setting; the first of them is always there.
SEALED: dict[str, dict[str, Any]] = {
    # Who shows which: transformers bits; GPTQModel, and others of its family, the format; vLLM a
    # rule that it cannot follow, before it trips over bits.
    "gptq": {
        "bits": NEEDS,
        "checkpoint_format": NEEDS,
        "dynamic": {NEEDS: {"desc_act": True, "group_size": 128}},
    },
    # A validation error shows the names that it does not know, and shortens values.
    "compressed-tensors": {
        "config_groups": {NEEDS: {"targets": ["Linear"], "weights": {NEEDS: True}}},
    },
}


def seal(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A quantization config as it is written to a file; sealed already, it stays as it is.

    Args:
        settings: With the entry, if there is one; a request is none.
    """
    entry = settings.get(KEY)
    if not isinstance(entry, Mapping) or "format_version" not in entry or not entry.get("joint"):
        return dict(settings)
    sealed = _sealed(settings)
    if VALUES in entry or not sealed or next(iter(sealed)) not in settings:
        return dict(settings)  # nobody else's loader checks these
    values = {name: settings[name] for name in sealed if name in settings}
    return {**settings, **copy.deepcopy(sealed), KEY: {**entry, VALUES: values}}


def unseal(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A quantization config as it was before ``seal``; any other stays as it is.

    Raises:
        BiasCompensationError: it is sealed, and has lost the values.
    """
    entry, sealed = settings.get(KEY), _sealed(settings)
    values = entry.get(VALUES) if isinstance(entry, Mapping) else None
    first = next(iter(sealed), None)
    if values is None and (first is None or settings.get(first) != sealed[first]):
        return dict(settings)
    if not isinstance(values, Mapping) or first not in values:
        raise BiasCompensationError(
            f"the quantization config is that of {NEEDS}; but its {KEY} entry has no {VALUES!r} "
            f"with the values of {' and '.join(sealed)}. Take the config from the original "
            "checkpoint."
        )
    plain = {name: value for name, value in settings.items() if name not in sealed}
    own = {name: value for name, value in entry.items() if name != VALUES}
    return {**plain, **values, KEY: own}


def _sealed(settings: Mapping[str, Any]) -> dict[str, Any]:
    return SEALED.get(str(settings.get("quant_method", "gptq")), {})
