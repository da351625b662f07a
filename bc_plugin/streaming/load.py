"""A model of transformers whose weights stay in the files of a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BiasCompensationError
from ..models.blocks import find_block_lists
from ..models.modules import fastest_device, set_tensor, stored_tensors
from ..names import KEY
from ..vectors.checkpoint import checkpoint_files, require_bound
from ..vectors.compensation import Compensation
from ..vectors.joint import mark_joint, note_saved_without, saved_without
from ..vectors.lazy import LazyTensor, tensors_in
from ..vectors.settings import read_settings
from .errors import CannotStream, no_tensor
from .linears import put_packed
from .tensors import StoredTensors


def open_streamed(
    folder: str | Path,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    blocks: str | Sequence[str] | None = None,
    kind: Any = None,
) -> nn.Module:
    """A model that is run, and compensated, with one block in memory at a time.

    Blocks and the output embedding have their weights while they run; of the input embedding only
    rows that are looked up are read. Everything else is small, and there. Vectors of a compensated
    checkpoint are not in place; where its weights count on them, the model is marked so.

    Args:
        folder: Of safetensors files and a ``config.json``: a float model, or one quantized with
            GPTQ (2, 3, 4 or 8 bits), AWQ or compressed-tensors (``pack-quantized``), for which no
            kernel is needed.
        dtype: As ``from_pretrained`` has it; ``"auto"`` takes the checkpoint's.
        device: Where it computes; ``"auto"`` takes the accelerator, if there is one.
        blocks: Where its blocks are, if ``find_block_lists`` cannot tell.
        kind: The class, or a class of transformers that finds it, such as
            ``AutoModelForCausalLM``; without it the one that the config names.

    Raises:
        CannotStream: its format, or its architecture's names for tensors, are unknown here.
        BiasCompensationError: a file is damaged, or a tensor is missing or has another shape.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise BiasCompensationError(f"{folder} is no folder with a config.json and weights.")
    files = checkpoint_files(folder)
    if not files or any(file.suffix != ".safetensors" for file in files):
        raise CannotStream(folder, "it has no weights in safetensors files")
    settings = read_settings(folder)
    places = {k: place for f in files for k, place in tensors_in(f, vectors=False).items()}
    model = _skeleton(folder, _dtype(dtype), places, kind)
    _require_one_type(folder, model)
    put_packed(folder, model, places, settings)
    lists = [found.path for found in find_block_lists(model, blocks)]
    _fill(
        model,
        _named(folder, model, places),
        lists,
        fastest_device() if device == "auto" else torch.device(device),
    )
    _note_joint(folder, files, model, settings.get(KEY))
    return model.eval()


def _dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    return getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype


def _skeleton(
    folder: Path, dtype: str | torch.dtype, places: Mapping[str, LazyTensor], kind: Any
) -> nn.Module:
    """The model without quantization, its parameters on the meta device."""
    import transformers
    from accelerate import init_empty_weights

    config = transformers.AutoConfig.from_pretrained(folder)
    vars(config).pop("quantization_config", None)
    if kind is None:
        names = getattr(config, "architectures", None) or [""]
        kind = getattr(transformers, names[0], None)
        if kind is None:
            raise CannotStream(folder, f"transformers has no class {names[0]!r}")
    if dtype == "auto":
        dtype = getattr(config, "dtype", None) or _first_float(places)
    build = getattr(kind, "_from_config", None) or kind.from_config
    with init_empty_weights(include_buffers=False):
        model = build(config, dtype=dtype)
    model.tie_weights()
    return model


def _first_float(places: Mapping[str, LazyTensor]) -> torch.dtype:
    dtypes = (place.dtype for place in places.values())
    return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)


def _require_one_type(folder: Path, model: nn.Module) -> None:
    """Raises: CannotStream: types are that change while loading."""
    names = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
    if any(getattr(model, name, None) for name in names):
        raise CannotStream(folder, f"parts of a {type(model).__name__} have types of their own")


def _named(
    folder: Path, model: nn.Module, places: Mapping[str, LazyTensor]
) -> dict[str, LazyTensor]:
    """Where each of the model's tensors is, by its name in the model."""
    prefix = f"{model.base_model_prefix}."
    tensors = dict(stored_tensors(model))
    tied: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        tied.setdefault(id(tensor), []).append(name)
    found: dict[str, LazyTensor] = {}
    missing: list[str] = []
    for names in tied.values():
        keys = (key for n in names for key in (n, prefix + n, n.removeprefix(prefix)))
        key = next((key for key in keys if key in places), None)
        if key is not None:
            found |= dict.fromkeys(names, places[key])
        elif tensors[names[0]].is_meta:  # a buffer has its value from the config otherwise
            missing.append(names[0])
    if missing:
        used = {place.stored.key for place in found.values()}
        if set(places) - used:  # other names, as for experts that transformers stacks
            raise CannotStream(
                folder, f"{len(missing)} tensors have other names there, such as {missing[0]}"
            )
        files = sorted({place.stored.path.name for place in places.values()})
        raise no_tensor(folder / files[0] if len(files) == 1 else folder, missing[0])
    for name, place in found.items():
        if place.shape != tensors[name].shape:
            stored = place.stored
            raise BiasCompensationError(
                f"{stored.path}: {stored.key} has the shape {tuple(place.shape)}, the config's is "
                f"{tuple(tensors[name].shape)}; download or save the checkpoint again."
            )
    return found


def _fill(
    model: nn.Module, places: Mapping[str, LazyTensor], lists: Sequence[str], device: torch.device
) -> None:
    """Hooks that lend blocks and embeddings their weights, and everything else."""
    from accelerate.hooks import add_hook_to_module

    from .lending import Lending, RowsLending

    lending: dict[nn.Module, type[Lending]] = {}
    for path in lists:
        lending |= dict.fromkeys(model.get_submodule(path), Lending)
    head, table = model.get_output_embeddings(), _input_embeddings(model)
    lending |= {head: Lending} if head is not None else {}
    lending |= {table: RowsLending} if isinstance(table, nn.Embedding) else {}
    lent = set()
    for path, module in model.named_modules():
        if module in lending:
            inside = {
                name[len(path) + 1 :]: place
                for name, place in places.items()
                if name.startswith(f"{path}.")
            }
            lent |= {f"{path}.{name}" for name in inside}
            add_hook_to_module(module, lending[module](StoredTensors(inside), device))
    for name, tensor in _tensors(model).items():
        if name not in lent:
            value = places[name].stored.mapped() if name in places else tensor
            set_tensor(model, name, value.to(device, tensor.dtype))


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _input_embeddings(model: nn.Module) -> nn.Module | None:
    try:
        return model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def _note_joint(
    folder: Path, files: Sequence[Path], model: nn.Module, entry: Mapping[str, Any] | None
) -> None:
    """What ``from_pretrained`` finds out of vectors, which are left out here."""
    note_saved_without(entry, model)
    if entry is None or saved_without(entry):
        return
    require_bound(entry, files)
    before = Compensation.load(folder)
    if before.joint:
        mark_joint(model, (name for name, kind in before.kinds.items() if kind == "linear"))
