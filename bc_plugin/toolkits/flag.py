"""The ``bias_compensation`` of a toolkit's config object: a request, or an entry.

A request is what the user asks for, an entry what a compensated checkpoint stores. No object ever
goes from one to the other: the user's may serve for many models, and asks for each of them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..config import BiasCompensationConfig
from ..errors import BiasCompensationError
from ..names import KEY
from ..vectors.joint import entry_to_save
from ..vectors.sealed import seal

OF_ENTRIES = {"format_version", "digest", "vectors_digest", "errors"}  # no setting is called so


def is_entry(value: Any) -> bool:
    """Whether ``value`` is what a compensated checkpoint stores, not a request to compensate."""
    return isinstance(value, Mapping) and not OF_ENTRIES.isdisjoint(value)


def set_flag(config: Any, value: Any) -> None:
    """Keep the value of the ``bias_compensation`` keyword on a toolkit's config object.

    A request is kept as a plain dict, so that the config can be written as JSON.
    """
    if is_entry(value):
        setattr(config, KEY, dict(value))
    else:
        parsed = BiasCompensationConfig.parse(value)
        if parsed is not None:
            setattr(config, KEY, parsed.to_dict())


def flag_of(config: Any) -> BiasCompensationConfig | None:
    """The request kept on a toolkit's config object, if there is one."""
    value = getattr(config, KEY, None)
    return None if is_entry(value) else BiasCompensationConfig.parse(value)


def asked(value: Any) -> BiasCompensationConfig | None:
    """What a toolkit that is about to quantize is asked for.

    Raises:
        BiasCompensationError: ``value`` is an entry.
    """
    if is_entry(value):
        raise BiasCompensationError(
            f"{KEY} is the entry of a compensated checkpoint (digest "
            f"{str(value.get('digest'))[:8]}...), which tells of its vectors and asks for none. To "
            "quantize with compensation pass "
            "True, a dict such as {'positions': 1} or a BiasCompensationConfig; to quantize "
            f"without it leave {KEY} out."
        )
    return BiasCompensationConfig.parse(value)


def asked_by(config: Any, kwargs: dict[str, Any] | None = None) -> BiasCompensationConfig | None:
    """``asked`` of a toolkit's config object, or of its ``quantize``, whose keyword goes first.

    Args:
        config: Left as it is.
        kwargs: Those of the toolkit's ``quantize``; the keyword, where given, is taken out.
    """
    if kwargs and KEY in kwargs:
        return asked(kwargs.pop(KEY))
    return asked(getattr(config, KEY, None))


def config_of(model: nn.Module, config: Any) -> Any:
    """The config of a quantized model: a copy, with the model's entry where the request was.

    The config itself, where there is neither.
    """
    entry = entry_to_save(model)
    if entry is None and not hasattr(config, KEY):
        return config
    config = copy.copy(config)
    vars(config).pop(KEY, None)
    set_flag(config, entry)
    return config


def config_to_dict(wrapped, config, args, kwargs):
    """Wrapper for the ``to_dict`` of a config, by which it is saved.

    A config that lists its own fields only is given its entry; a request has no business there.
    """
    settings = wrapped(*args, **kwargs)
    if is_entry(getattr(config, KEY, None)):
        settings[KEY] = getattr(config, KEY)
    return seal(settings)
