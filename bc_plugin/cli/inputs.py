"""From arguments to models, tokenizers and calibration data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..config import BiasCompensationConfig
from ..errors import BiasCompensationError
from ..gguf.file import GGUFFile, is_gguf
from .arguments import SPREAD


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


def stream_or(load: Callable[..., Any]) -> Callable[..., Any]:
    """Instead of loading a model, leave its weights in its files; where that cannot be, load it."""

    def open_model(argument: str, name: str, dtype: str, device_map: str) -> Any:
        if is_gguf(name):
            return load(argument, name, dtype, device_map)
        from tqdm.auto import tqdm
        from transformers import AutoModelForCausalLM

        from ..streaming.errors import CannotStream
        from ..streaming.load import open_streamed

        device = "auto" if device_map in SPREAD else device_map
        with _told(argument, name, "read", "a causal language model that transformers loads"):
            try:
                folder = folder_of(name)
                return open_streamed(folder, dtype, device, kind=AutoModelForCausalLM)
            except CannotStream as error:
                tqdm.write(f"{argument} {name} is loaded whole: {error.why}.")
        return load(argument, name, dtype, device_map)

    return open_model


def folder_of(name: str | Path) -> Path:
    """A folder as it is; of a name on the hub its files in the cache, which get there."""
    if Path(name).is_dir():
        return Path(name)
    from transformers.utils.hub import cached_file, get_checkpoint_shard_files

    from ..vectors.checkpoint import INDEX, SINGLE

    if_there = {"_raise_exceptions_for_missing_entries": False}
    index = cached_file(name, INDEX, **if_there)
    if index is None:
        cached_file(name, SINGLE, **if_there)
    else:
        get_checkpoint_shard_files(name, index)
    return Path(cached_file(name, "config.json")).parent


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
    name: str,
    text: str | None,
    length: int,
    samples: int,
    dtype: str,
    device_map: str,
    load: Callable[..., Any] | None = None,
) -> tuple[Any, list[dict[str, Any]], Any]:
    """The tokenizer of FLOAT, calibration data, and the model itself, which is loaded once.

    Of several ranks each gets its share of the data; what the model writes is the first one's.

    Args:
        load: Used in the place of ``load_model``, but where the model has text to write.

    Raises:
        BiasCompensationError: it cannot be loaded; or, before it is, the text is too short.
    """
    tokenizer = load_tokenizer("FLOAT", name)
    which = "FLOAT", name, dtype, device_map
    model = load_model(*which) if text is None else None
    data = calibration_data(text, tokenizer, length, samples, lambda: model)
    from ..ranks import given_by_first, part_of

    if model is None:
        model = (load or load_model)(*which)
    else:
        data = given_by_first(data)
    return tokenizer, data[part_of(len(data))], model
