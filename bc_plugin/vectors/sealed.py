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
# Who shows which: transformers bits; GPTQModel, and others of its family, the format; vLLM a rule
# that it cannot follow, before it trips over bits.
SEALED = {
    "bits": NEEDS,
    "checkpoint_format": NEEDS,
    "dynamic": {NEEDS: {"desc_act": True, "group_size": 128}},
}


def seal(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A quantization config as it is written to a file; sealed already, it stays as it is.

    Args:
        settings: With the entry, if there is one; a request is none.
    """
    entry = settings.get(KEY)
    if not isinstance(entry, Mapping) or "format_version" not in entry or not entry.get("joint"):
        return dict(settings)
    if VALUES in entry or settings.get("quant_method", "gptq") != "gptq" or "bits" not in settings:
        return dict(settings)  # nobody else's loader checks these
    values = {name: settings[name] for name in SEALED if name in settings}
    return {**settings, **copy.deepcopy(SEALED), KEY: {**entry, VALUES: values}}


def unseal(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A quantization config as it was before ``seal``; any other stays as it is.

    Raises:
        BiasCompensationError: it is sealed, and has lost the values.
    """
    entry = settings.get(KEY)
    values = entry.get(VALUES) if isinstance(entry, Mapping) else None
    if values is None and settings.get("bits") != NEEDS:
        return dict(settings)
    if not isinstance(values, Mapping) or "bits" not in values:
        raise BiasCompensationError(
            f"the quantization config is that of {NEEDS}; but its {KEY} entry has no {VALUES!r} "
            f"with the values of {' and '.join(SEALED)}. Take the config from the original "
            "checkpoint."
        )
    plain = {name: value for name, value in settings.items() if name not in SEALED}
    own = {name: value for name, value in entry.items() if name != VALUES}
    return {**plain, **values, KEY: own}
