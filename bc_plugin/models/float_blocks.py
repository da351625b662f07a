"""The float model's blocks, one at a time, after the model itself has been overwritten."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from .blocks import Blocks
from .modules import device_of, set_tensor, stop_offloading
from .offloaded import lent, require_in_memory


class LiveBlocks:
    """Blocks of a float model that is still there.

    Args:
        model: The float model, on any device, also one that accelerate offloads, or is streamed.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @contextmanager
    def load(self, name: str, device: torch.device) -> Iterator[nn.Module]:
        """The block called ``name``, on ``device`` while the context lasts."""
        block = self.model.get_submodule(name)
        with lent(self.model, name):
            yield block if device_of(block) == device else copy.deepcopy(block).to(device)


def float_blocks_of(model: nn.Module | BlockSnapshot) -> LiveBlocks | BlockSnapshot:
    """The blocks of a float model, be it still there or a snapshot."""
    return LiveBlocks(model) if isinstance(model, nn.Module) else model


class BlockSnapshot:
    """The weights of a model's blocks, kept before a toolkit overwrites them.

    Where the model came from a folder of safetensors files, or by its name from the hub's cache, a
    tensor that stands there with the same values is read from the file again, memory-mapped; any
    other is copied to the CPU.

    Args:
        model: The float model.
        blocks: Where its blocks are.

    Raises:
        BiasCompensationError: the model is offloaded.
    """

    def __init__(self, model: nn.Module, blocks: Blocks) -> None:
        require_in_memory(model, [blocks.path])
        files = _safetensors(model)
        self.skeletons: dict[str, nn.Module] = {}
        self.files: dict[tuple[str, str], tuple[Path, str]] = {}
        self.copies: dict[tuple[str, str], Tensor] = {}
        for name in blocks.names:
            block = model.get_submodule(name)
            for key, tensor in _tensors(block).items():
                candidates = files.get(f"{name}.{key}", ())
                stored = next((c for c in candidates if _equal(_read(*c), tensor)), None)
                if stored is not None:
                    self.files[name, key] = stored
                else:
                    self.copies[name, key] = tensor.detach().to("cpu", copy=True)
            self.skeletons[name] = _without_weights(block)

    @contextmanager
    def load(self, name: str, device: torch.device) -> Iterator[nn.Module]:
        """The block called ``name``, on ``device`` while the context lasts."""
        block = copy.deepcopy(self.skeletons[name])
        for key, empty in list(_tensors(block).items()):
            stored = self.files.get((name, key))
            tensor = self.copies[name, key] if stored is None else _read(*stored)
            set_tensor(block, key, tensor.to(device, empty.dtype))
        yield block.eval()


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, those included that a state dict leaves out."""
    return dict(module.named_parameters()) | dict(module.named_buffers())


def _without_weights(block: nn.Module) -> nn.Module:
    """A copy of ``block`` on the meta device; the weights themselves are never copied."""
    stored = (
        getattr(tensors, "offloaded_values", tensors)  # of compressed-tensors, which lends copies
        for module in block.modules()
        for tensors in (module._parameters, module._buffers)
    )
    memo = {id(t): _meta(t) for each in stored for t in each.values() if t is not None}
    skeleton = copy.deepcopy(block, memo)
    stop_offloading(skeleton, to_device=False)
    return skeleton


def _meta(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


def folders_of(model: nn.Module) -> list[Path]:
    """Where the model may have come from: its folder, or the revisions in the hub's cache."""
    config = getattr(model, "config", None)
    source = getattr(config, "_name_or_path", None)
    if not source:
        return []
    if Path(source).is_dir():
        return [Path(source)]
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.file_download import repo_folder_name

    try:
        repository = Path(HF_HUB_CACHE, repo_folder_name(repo_id=source, repo_type="model"))
    except HFValidationError:  # a folder that is no longer there
        return []
    # transformers 5 does not say which revision it has read; the tensors will tell.
    return sorted(repository.glob(f"snapshots/{getattr(config, '_commit_hash', None) or '*'}"))


def _safetensors(model: nn.Module) -> dict[str, list[tuple[Path, str]]]:
    """Where each of the model's tensors may stand in the files the model came from."""
    prefix = getattr(model, "base_model_prefix", "") + "."
    found: dict[str, list[tuple[Path, str]]] = {}
    for folder in folders_of(model):
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                for key in file.keys():  # noqa: SIM118, not a dict
                    found.setdefault(key, []).append((path, key))
                    found.setdefault(prefix + key, []).append((path, key))
    return found


def _read(path: Path, key: str) -> Tensor:
    with safe_open(path, "pt") as file:
        return file.get_tensor(key)


def _equal(stored: Tensor, live: Tensor) -> bool:
    if stored.shape != live.shape or live.is_meta:
        return False
    return torch.equal(stored.to(live.dtype), live.detach().cpu())
