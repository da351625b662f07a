"""From arguments to models, tokenizers and calibration data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..config import BiasCompensationConfig
from ..errors import BiasCompensationError
from ..gguf.file import GGUFFile, is_gguf


def pass_settings(positions: str, sites: str, **others: Any) -> BiasCompensationConfig:
    """Raises: BiasCompensationError: a value is out of range."""
    count = int(positions) if positions.isdecimal() else positions
    return BiasCompensationConfig(
        positions=count, sites=tuple(sites.replace(",", " ").split()), **others
    )


def load_model(argument: str, name: str | Path, dtype: str, device_map: str, **kwargs: Any) -> Any:
    """A causal language model of a folder, a name on the hub or a GGUF file, with its vectors.

    Raises:
        BiasCompensationError: it cannot be loaded.
    """
    if is_gguf(name):
        return _load_file(name, dtype, device_map, **kwargs)
    from transformers import AutoModelForCausalLM

    done = "quantized" if "quantization_config" in kwargs else "loaded"
    with _told(argument, name, done, "a causal language model that transformers loads"):
        return AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, device_map=device_map, **kwargs
        ).eval()


def _load_file(name: str | Path, dtype: str, device_map: str, config: Any = None) -> Any:
    import torch

    from ..gguf.compensated import compensation_in
    from ..gguf.load import load_model as load

    file = GGUFFile(name)
    kind = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    model, compensation = load(file, kind, device_map, config), compensation_in(file)
    if compensation is not None:
        compensation.attach_unchecked(model)
    return model


def config_of(name: str | Path) -> Any:
    """The config of a folder or of a name on the hub; None for a GGUF file, which has none."""
    from transformers import AutoConfig

    return None if is_gguf(name) else AutoConfig.from_pretrained(name)


def load_as_stored(argument: str, name: str | Path, dtype: str, device_map: str) -> Any:
    """A quantized model whose weights are known as its files have them, whatever kernels do."""
    from ..toolkits.load import keeping_weights

    with keeping_weights():
        return load_model(argument, name, dtype, device_map)


def load_tokenizer(argument: str, name: str | Path) -> Any:
    """Raises: BiasCompensationError: it cannot be loaded."""
    from transformers import AutoTokenizer

    with _told(f"the tokenizer of {argument}", name, "loaded", "its files beside the weights"):
        if is_gguf(name):
            # Where nothing else is: transformers would take a tokenizer's files beside it.
            with TemporaryDirectory() as folder:
                Path(folder, "model.gguf").symlink_to(Path(name).absolute())
                return AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")
        return AutoTokenizer.from_pretrained(name)


@contextmanager
def _told(what: str, name: str | Path, done: str, expected: str) -> Iterator[None]:
    """Errors of transformers, which are of all kinds, say what was to be done with what."""
    try:
        yield
    except BiasCompensationError:
        raise
    except Exception as error:
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        damaged = [str(path) for path in sorted(Path(name).glob("*.safetensors")) if _broken(path)]
        if damaged:
            said = f"{', '.join(damaged)} is damaged; {said}"
        raise BiasCompensationError(
            f"{what}, {name}, cannot be {done} ({said}). Expected {expected}; name another, or get "
            "it again from where it came from."
        ) from error


def _broken(path: Path) -> bool:
    from safetensors import safe_open

    try:
        with safe_open(path, "pt"):
            return False
    except Exception:
        return True


def calibration_data(
    text: str | None, tokenizer: Any, length: int, samples: int, float_model: Callable[[], Any]
) -> list[dict[str, Any]]:
    """Windows of the text, or, without one, of what the float model writes.

    Raises:
        BiasCompensationError: the text is too short, or the windows are.
    """
    from ..calibration import sample_from, windows

    if text is None:
        return sample_from(float_model(), tokenizer, length, samples)
    return windows(text, tokenizer, length, samples)


def float_inputs(
    name: str, text: str | None, length: int, samples: int, dtype: str, device_map: str
) -> tuple[Any, list[dict[str, Any]], Any]:
    """The tokenizer of FLOAT, calibration data, and the model itself, which is loaded once.

    Of several ranks each gets its share of the data; what the model writes is the first one's.

    Raises:
        BiasCompensationError: it cannot be loaded; or, before it is, the text is too short.
    """
    tokenizer = load_tokenizer("FLOAT", name)
    load = partial(load_model, "FLOAT", name, dtype, device_map)
    model = load() if text is None else None
    data = calibration_data(text, tokenizer, length, samples, lambda: model)
    from ..ranks import given_by_first, part_of

    data = data if model is None else given_by_first(data)
    return tokenizer, data[part_of(len(data))], load() if model is None else model
