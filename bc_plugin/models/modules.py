"""What is asked of any module: its tensors, linears, type and device, a copy to run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

WIDTHS = ("in_features", "out_features")


def copy_of(block: nn.Module) -> nn.Module:
    """A copy to run: some kernels repack their weights when first run, for good, and the model
    could not be saved afterwards. A block that accelerate moves about is returned itself."""
    if any(hasattr(module, "_hf_hook") for module in block.modules()):
        return block
    # Tensors that wrap others (optimum-quanto's) cannot be copied; nothing repacks them either.
    shared = {id(t): t for t in block.parameters() if is_traceable_wrapper_subclass(t)}
    twin = copy.deepcopy(block, shared)
    stop_offloading(twin)
    decompress(twin)
    return twin


def stop_offloading(copied: nn.Module, to_device: bool = True) -> None:
    """Let a copy keep its weights itself that it has of a module compressed-tensors offloads.

    With several ranks each change of an offloaded weight is one that all of them have to make.

    Args:
        to_device: Whether they go where they are used, and do not stay where they are.
    """
    for module in copied.modules():
        if hasattr(module, "_original_forward_func"):
            from compressed_tensors.offload.module import remove_module_offload

            remove_module_offload(module, onload_tensors=to_device)


def decompress(copied: nn.Module) -> None:
    """What compressed-tensors does to a whole model, for good, when that is first run."""
    for module in copied.modules():
        if getattr(module, "quantization_status", None) == "compressed":
            from compressed_tensors.compressors.base import decompress_module

            decompress_module(module)
    hook = vars(copied).pop("ct_decompress_hook", None)  # a whole model's, which would do it twice
    if hook is not None:
        hook.remove()


@contextmanager
def alongside(
    model: nn.Module,
    quantized: Mapping[str, nn.Module],
    prepare: Callable[[str, Tensor], Tensor],
    compare: Callable[[str, Tensor, Tensor], None],
) -> Iterator[None]:
    """While it lasts, what goes into a float module also goes through a quantized one.

    Args:
        model: Runs the float modules.
        quantized: By path in ``model``.
        prepare: From a path and the float module's input, the quantized module's.
        compare: Called with the path and both outputs, the float one first.
    """

    def hook_of(path: str) -> Callable[[nn.Module, tuple, Tensor], None]:
        def hook(_: nn.Module, args: tuple, output: Tensor) -> None:
            compare(path, output, quantized[path](prepare(path, args[0])))

        return hook

    with ExitStack() as hooks:
        for path in quantized:
            handle = model.get_submodule(path).register_forward_hook(hook_of(path))
            hooks.callback(handle.remove)
        yield


def stored_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers, by name.

    Not through ``state_dict``: some kernels (bitsandbytes) repack their weights back for it, in
    place, and lose precision on the way.
    """
    for path, child in module.named_modules():
        prefix = f"{path}." if path else ""
        for name, parameter in child._parameters.items():
            if parameter is not None:
                yield prefix + name, parameter
        for name, buffer in child._buffers.items():
            if buffer is not None and name not in child._non_persistent_buffers_set:
                yield prefix + name, buffer


def set_tensor(module: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """Put a tensor where a parameter or buffer is, by its path; what then stands there."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._parameters:
        tensor = nn.Parameter(tensor.detach(), requires_grad=False)
        owner._parameters[leaf] = tensor
    else:
        owner._buffers[leaf] = tensor
    return tensor


def plain_part(tensor: Tensor) -> Tensor:
    """``tensor``, or the largest tensor within one of TorchAO's, which cannot be reshaped."""
    while type(tensor).__module__.startswith("torchao"):
        parts = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
        tensor = max((part for part in parts if part is not None), key=lambda part: part.nbytes)
    return tensor


def is_linear(module: nn.Module) -> bool:
    # transformers' Conv1D (GPT-2) is a linear with the weight transposed.
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def widths_of(linear: nn.Module) -> tuple[int | None, int | None]:
    """Features in and out; AutoGPTQ spells them otherwise, and what has none has None."""
    names = ("infeatures", "outfeatures") if hasattr(linear, "infeatures") else WIDTHS
    first, last = (getattr(linear, name, None) for name in names)
    return first, last


def gives_features(linear: nn.Module, output: Any) -> bool:
    """Whether ``output`` is one value for each output feature of ``linear``, as a bias is.

    Routers that are linears return choices, too (Llama 4), grouped ones give groups (DeepSeek-V4).
    """
    features = linear.weight.shape[0 if isinstance(linear, nn.Linear) else -1]
    return isinstance(output, Tensor) and output.shape[-1] == features


def linears_of(block: nn.Module) -> list[tuple[str, nn.Module]]:
    """The linears of a float block, with their paths within it."""
    return [(name, module) for name, module in block.named_modules() if is_linear(module)]


def dtype_of(model: nn.Module) -> torch.dtype:
    """The type ``model`` computes in: that of its first floating parameter."""
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def device_of(module: nn.Module) -> torch.device:
    """Where ``module`` computes, also when accelerate keeps its weights elsewhere."""
    for child in module.modules():
        execution = getattr(getattr(child, "_hf_hook", None), "execution_device", None)
        if execution is not None:
            return torch.device(execution)
    return next(stored_tensors(module))[1].device


def fastest_device() -> torch.device:
    """The accelerator, or the CPU where there is none."""
    found = torch.accelerator.is_available()
    return torch.accelerator.current_accelerator() if found else torch.device("cpu")


@contextmanager
def evaluating(*models: Any) -> Iterator[None]:
    """While it lasts, modules among these only evaluate: uncompiled and without gradients."""
    modules = [model for model in models if isinstance(model, nn.Module)]
    training = [module.training for module in modules]
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        try:
            for module in modules:
                module.eval()
            yield
        finally:
            for module, mode in zip(modules, training, strict=True):
                module.train(mode)
