"""A checkpoint's settings: those of its quantization, and those that decide what it computes."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import BiasCompensationError
from ..names import KEY, SETTINGS_DIGEST
from .sealed import unseal

CONFIG, SETTINGS = "config.json", "quantize_config.json"
# Parts of names, in lower case, by which settings are told that change what weights compute. Others
# (tokens, names, caches, defaults of generation) are nobody's business here.
_COMPUTES = re.compile(
    r"act|attention|bias|bits|desc|dim|eps|expert|format|group_size|head|hidden|layer|linear|"
    r"method|multiplier|norm|quant|rope|rotary|scal|size|softcap|sym|theta|tie_|version|window|zero"
)
_DOES_NOT = re.compile(
    r"chunk_size|damp|dataset|dropout|initializer|attn_implementation|loss|max_position|meta|"
    r"transformers_version|true_sequential|vocab_size|act_group_aware"
)


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        BiasCompensationError: it is damaged, or cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BiasCompensationError(
            f"{path} cannot be read as JSON ({error}); download or save it again."
        ) from error


def settings_in(path: Path) -> dict[str, Any]:
    """The quantization settings in a toolkit's file, empty where there is none.

    A model that no toolkit quantized has the entry of its vectors beside its other settings.

    Raises:
        BiasCompensationError: the file is damaged.
    """
    content = read_json(path) if path.is_file() else {}
    if isinstance(content, dict) and path.name == CONFIG:
        own = {KEY: content[KEY]} if KEY in content else {}
        content = content.get("quantization_config") or own
    if not isinstance(content, dict):
        raise BiasCompensationError(
            f"{path} has quantization settings that are no JSON object; download or save it again."
        )
    return unseal(content)


def read_settings(folder: str | Path) -> dict[str, Any]:
    """The quantization settings of a checkpoint, wherever its toolkit keeps them."""
    return settings_in(Path(folder, CONFIG)) or settings_in(Path(folder, SETTINGS))


def settings_digest(folder: str | Path) -> str:
    """BLAKE2b over those settings in ``config.json`` by which the same weights compute otherwise.

    Raises:
        BiasCompensationError: the file is damaged.
    """
    path = Path(folder, CONFIG)
    content = read_json(path) if path.is_file() else {}
    if isinstance(content, dict) and isinstance(content.get("quantization_config"), dict):
        content["quantization_config"] = unseal(content["quantization_config"])
    text = json.dumps(_that_compute(content), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def require_settings(entry: Mapping[str, Any], folder: str | Path) -> None:
    """Make sure that an entry was written with these settings.

    Raises:
        BiasCompensationError: it was written with others.
    """
    expected = entry.get(SETTINGS_DIGEST)
    if expected is not None and settings_digest(folder) != expected:
        raise BiasCompensationError(
            f"{Path(folder, CONFIG)} was changed since its {KEY} entry was written: a setting by "
            "which the same weights compute otherwise (such as a norm's epsilon, the rotation of "
            "positions, the quantization's bits or format) has another value. Restore it, or "
            "compensate the checkpoint again."
        )


def _that_compute(content: Any) -> Any:
    """The settings that count, at every depth; what is within one that counts, whole."""
    if not isinstance(content, dict):
        return None
    found = {}
    for name, value in content.items():
        lower = str(name).lower()
        if name == KEY or _DOES_NOT.search(lower):
            continue
        if isinstance(value, dict):
            found[name] = _that_compute(value)
        elif _COMPUTES.search(lower):
            found[name] = value
    return {name: value for name, value in found.items() if value not in (None, {})}
