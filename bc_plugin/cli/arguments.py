"""Arguments, checked before anything heavy is imported."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config import DTYPES
from ..errors import BiasCompensationError
from ..names import KEY
from ..texts import read_text

SELF = "self"  # the data set that the float model writes
HUB_NAME = r"\w[\w.-]*(/\w[\w.-]*)?"
DEVICES = ("cpu", "cuda", "mps", "xpu", "npu", "hpu")
SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")
BITS = (2, 3, 4, 8)
# Types that models are published in and that transformers computes with as they are.
PUBLISHED = ("fp8", "mxfp4")
WIDTHS = ("hidden_size", "intermediate_size", "n_embd", "ffn_dim")


def one_of(option: str, value: Any, known: Sequence[Any]) -> None:
    """Raises: BiasCompensationError: the value is none of those known."""
    if value not in known:
        raise BiasCompensationError(
            f"{option} {value}: expected one of {', '.join(map(str, known))}."
        )


def check_loading(dtype: str, device_map: str) -> None:
    """What models are loaded in, and where to; whether it is there, if it is no CPU.

    Raises:
        BiasCompensationError: there is no such type, or no such device.
    """
    one_of("--dtype", dtype, DTYPES)
    kind, _, number = device_map.partition(":")
    if kind not in DEVICES + SPREAD or (number and (kind in SPREAD or not number.isdecimal())):
        raise BiasCompensationError(
            f"--device-map {device_map}: expected one of {', '.join(SPREAD + DEVICES)}, or a "
            "device with a number, such as cuda:0."
        )
    if kind in DEVICES[1:]:
        import torch

        try:
            torch.empty(1, device=device_map)
        except Exception as error:  # each backend has errors of its own
            said = str(error).splitlines()[0]
            raise BiasCompensationError(
                f"--device-map {device_map}: PyTorch has no such device here ({said}). Use cpu, "
                "or auto, which takes what there is."
            ) from error


def model_config(argument: str, name: str | Path) -> dict[str, Any]:
    """The config of a checkpoint: a folder's, or that of a name on the hub.

    Raises:
        BiasCompensationError: there is no such folder or name, or it is no checkpoint.
    """
    folder, what = Path(name), f"{argument} {name}"
    advice = "name a folder that `save_pretrained` wrote"
    if not folder.is_dir():
        if folder.exists():
            raise BiasCompensationError(f"{what} is a file; {advice}.")
        if isinstance(name, Path) or not re.fullmatch(HUB_NAME, name):
            raise BiasCompensationError(f"{what} does not exist; {advice}.")
        path = _config_on_hub(what, name)
    else:
        path = folder / "config.json"
    if not path.is_file():
        raise BiasCompensationError(f"{what} is no checkpoint: it has no config.json; {advice}.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"expected an object, found {type(config).__name__}")
    except (OSError, ValueError) as error:
        raise BiasCompensationError(
            f"{argument} {path} is damaged ({error}); get it again from where the checkpoint "
            "came from."
        ) from error
    return config


def _config_on_hub(what: str, name: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, "config.json"))
    except Exception as error:  # no such name, no access, no network
        said = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        raise BiasCompensationError(
            f"{what} is no folder, and the hub gives no model of that name ({said}); name a folder "
            "that `save_pretrained` wrote, or a model that the hub, or its cache here, has."
        ) from error


def float_config(name: str) -> dict[str, Any]:
    """The config of FLOAT, as ``model_config`` has it.

    Raises:
        BiasCompensationError: and where it is not a float model.
    """
    config = model_config("FLOAT", name)
    quantized = config.get("quantization_config") or {}
    method = quantized.get("quant_method", "an unknown method")
    if (quantized and method not in PUBLISHED) or KEY in config:
        how = f"quantized ({method})" if quantized else "compensated"
        raise BiasCompensationError(
            f"FLOAT {name} is {how}; expected the float model it came from. Are the arguments "
            "in the order that --help shows?"
        )
    return config


def check_gptq(bits: int, group_size: int, damp: float, config: dict[str, Any]) -> None:
    """Raises: BiasCompensationError: GPTQ cannot quantize so, or not such a model."""
    one_of("--bits", bits, BITS)
    if group_size != -1 and group_size < 1:
        raise BiasCompensationError(
            f"--group-size {group_size}: expected a number above 0, such as 128, or -1 for rows."
        )
    if not 0 < damp < 1:
        raise BiasCompensationError(f"--damp {damp}: expected a share above 0 and below 1.")
    for name in WIDTHS:
        width = config.get(name)
        if group_size > 0 and isinstance(width, int) and width % group_size:
            raise BiasCompensationError(
                f"--group-size {group_size} does not divide FLOAT's {name}, {width}; use one that "
                "does, such as 32, 64 or 128, or -1 for rows."
            )


def text_of(dataset: str, or_written: bool = True) -> str | None:
    """The text of ``--dataset``; None where the float model is to write it, if it may.

    Raises:
        BiasCompensationError: it cannot be read.
    """
    return None if or_written and dataset == SELF else read_text(dataset)
