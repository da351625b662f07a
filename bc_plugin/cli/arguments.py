"""Arguments, checked before anything heavy is imported."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from ..config import DTYPES
from ..errors import BiasCompensationError
from ..gguf.file import GGUFFile, is_gguf
from ..names import KEY
from ..texts import read_text

SELF = "self"  # the data set that the float model writes
SAVED = "name a folder that `save_pretrained` wrote"
HUB_NAME = r"\w[\w.-]*(/\w[\w.-]*)?"
DEVICES = ("cpu", "cuda", "mps", "xpu", "npu", "hpu")
SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")
BITS = (2, 3, 4, 8)
# Types that models are published in and that transformers computes with as they are.
PUBLISHED = ("fp8", "mxfp4")
GROUP_SIZES = (-1, 16, 32, 64, 128, 256, 512, 1024)  # those that gptqmodel has kernels for


def one_of(option: str, value: Any, known: Sequence[Any]) -> None:
    """Raises: BiasCompensationError: the value is none of those known."""
    if value not in known:
        raise BiasCompensationError(
            f"{option} {value}: expected one of {', '.join(map(str, known))}."
        )


def check_dtype(dtype: str) -> None:
    """Raises: BiasCompensationError: there is no such type."""
    one_of("--dtype", dtype, DTYPES)


def check_loading(dtype: str, device_map: str) -> None:
    """What models are loaded in, and where to; whether it is there, if it is no CPU.

    Raises:
        BiasCompensationError: there is no such type, or no such device.
    """
    check_dtype(dtype)
    kind, _, number = device_map.partition(":")
    if kind not in DEVICES + SPREAD or (number and (kind in SPREAD or not number.isdecimal())):
        raise BiasCompensationError(
            f"--device-map {device_map}: expected one of {', '.join(SPREAD + DEVICES)}, or a "
            "device with a number, such as cuda:0."
        )
    fault = _no_device(device_map) if kind in DEVICES[1:] else None
    if fault is not None:
        raise BiasCompensationError(
            f"--device-map {device_map}: PyTorch has no such device here ({fault}). Use cpu, or "
            "auto, which takes what there is."
        )


def _no_device(device: str) -> str | None:
    """Why tensors cannot be on a device; None where they can."""
    version = metadata.version("torch")
    if version.endswith("+cpu"):  # which need not be imported to know
        return f"torch {version} is built for CPUs"
    import torch

    try:
        torch.empty(1, device=device)
    except Exception as error:  # each backend has errors of its own
        return str(error).splitlines()[0]
    return None


def model_config(argument: str, name: str | Path) -> dict[str, Any]:
    """The config of a checkpoint: a folder's, or that of a name on the hub.

    Raises:
        BiasCompensationError: there is no such folder or name, or it is no checkpoint.
    """
    if not Path(name).exists() and isinstance(name, str) and re.fullmatch(HUB_NAME, name):
        path = _config_on_hub(argument, name)
    else:
        path = existing_folder(argument, name) / "config.json"
    if not path.is_file():
        raise BiasCompensationError(
            f"{argument} {name} is no checkpoint: it has no config.json; {SAVED}."
        )
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


def existing_folder(argument: str, name: str | Path) -> Path:
    """Raises: BiasCompensationError: there is no such folder."""
    folder = Path(name)
    if not folder.is_dir():
        fault = "is a file" if folder.exists() else "does not exist"
        raise BiasCompensationError(f"{argument} {name} {fault}; {SAVED}.")
    return folder


def _config_on_hub(argument: str, name: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, "config.json"))
    except Exception as error:  # no such name, no access, no network
        said = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        raise BiasCompensationError(
            f"{argument} {name} is no folder, and the hub gives no model of that name ({said}); "
            f"{SAVED}, or a model that the hub, or its cache here, has."
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


def check_model(argument: str, name: str) -> None:
    """Raises: BiasCompensationError: it is no checkpoint, nor a GGUF file."""
    if is_gguf(name):
        GGUFFile(name)
    else:
        model_config(argument, name)


def check_float(name: str) -> None:
    """Raises: BiasCompensationError: FLOAT is no float model, of a folder, the hub or a file."""
    if not is_gguf(name):
        float_config(name)
    elif not GGUFFile(name).is_float:
        raise BiasCompensationError(
            f"FLOAT {name} is quantized ({', '.join(GGUFFile(name).types())}); expected the float "
            "model it came from. Are the arguments in the order that --help shows?"
        )


def check_gptq(
    bits: int, group_size: int, damp: float, desc_act: bool, act_group_aware: bool | None
) -> None:
    """Raises: BiasCompensationError: GPTQ cannot quantize so, or nothing runs what it makes."""
    one_of("--bits", bits, BITS)
    one_of("--group-size", group_size, GROUP_SIZES)
    if not 0 < damp < 1:
        raise BiasCompensationError(f"--damp {damp}: expected a share above 0 and below 1.")
    if desc_act and act_group_aware:
        raise BiasCompensationError(
            "--desc-act and --act-group-aware are two orders of the columns; leave one out."
        )


def text_of(dataset: str, or_written: bool = True) -> str | None:
    """The text of ``--dataset``; None where the float model is to write it, if it may.

    Raises:
        BiasCompensationError: it cannot be read.
    """
    return None if or_written and dataset == SELF else read_text(dataset)
