"""The ``bias_compensation`` flag on a toolkit's config object."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import BiasCompensationConfig
from ..names import KEY


def is_entry(value: Any) -> bool:
    """Whether ``value`` is what a compensated checkpoint stores, not a request to compensate."""
    return isinstance(value, Mapping) and "digest" in value


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


def forget_flag(config: Any) -> None:
    """Take the request, or the entry, off a toolkit's config object."""
    vars(config).pop(KEY, None)


def override_flag(config: Any, kwargs: dict[str, Any]) -> None:
    """Let the keyword of a toolkit's ``quantize``, where given, replace the config's request."""
    if KEY in kwargs:
        forget_flag(config)
        set_flag(config, kwargs.pop(KEY))


def config_to_dict(wrapped, config, args, kwargs):
    """Wrapper for the ``to_dict`` of a config that lists its own fields only."""
    settings = wrapped(*args, **kwargs)
    if hasattr(config, KEY):
        settings[KEY] = getattr(config, KEY)
    return settings
