"""The shared vector inside a bias that the module's own kernel adds, where it costs nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..models.modules import copy_of
from ..names import KEY

OWN_BIAS = "bias_without_compensation"


class MergedBias:
    """The shared vector inside the bias that the module's own kernel adds, where it costs nothing.

    The state dict keeps the bias the module had, so that a saved model does not count twice.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        base = module.bias
        self.home = "parameter" if "bias" in module._parameters else "attribute"
        self.persistent = False
        if "bias" in module._buffers:
            self.home = "buffer"
            self.persistent = "bias" not in module._non_persistent_buffers_set
        self.requires_grad = base is not None and base.requires_grad
        delattr(module, "bias")
        if base is None:  # not as a buffer: accelerate asks all of them for their device
            setattr(module, OWN_BIAS, None)
        else:
            module.register_buffer(OWN_BIAS, base.detach(), persistent=False)
        module.register_buffer("bias", None, persistent=False)
        self.dtype = dtype
        self._merge(module)
        self.handles = [module.register_load_state_dict_post_hook(self._merge)]
        if base is not None and (self.home == "parameter" or self.persistent):
            self.handles += [
                module.register_state_dict_post_hook(self._save_base),
                module.register_load_state_dict_pre_hook(self._load_base),
            ]

    def _merge(self, module: nn.Module, incompatible_keys: Any = None) -> None:
        base, shared = getattr(module, OWN_BIAS), getattr(module, KEY)[-1]
        wide = shared.to(torch.promote_types(shared.dtype, torch.float32))
        bias = wide if base is None else wide + base.to(wide)
        current = module.bias
        module.bias = bias.to(self.dtype if current is None else current.dtype)

    @staticmethod
    def _save_base(module: nn.Module, state: dict, prefix: str, metadata: Any) -> None:
        state[prefix + "bias"] = getattr(module, OWN_BIAS)

    @staticmethod
    def _load_base(module: nn.Module, state: dict, prefix: str, *rest: Any) -> None:
        if prefix + "bias" in state:
            getattr(module, OWN_BIAS).copy_(state.pop(prefix + "bias"))

    def undo(self, module: nn.Module) -> None:
        """Give the module its own bias back."""
        for handle in self.handles:
            handle.remove()
        base = getattr(module, OWN_BIAS)
        delattr(module, OWN_BIAS)
        delattr(module, "bias")
        if self.home == "buffer":
            module.register_buffer("bias", base, persistent=self.persistent)
        elif self.home == "attribute":
            module.bias = base
        else:
            if base is not None:
                base = nn.Parameter(base, requires_grad=self.requires_grad)
            module.register_parameter("bias", base)


_ADDS_BIAS: dict[tuple, bool] = {}


def kernel_adds_bias(module: nn.Module, vectors: Tensor, dtype: torch.dtype) -> bool:
    """Whether this kind of module adds its ``bias`` to its output, value by value.

    Found out by asking: a linear's output for a zero input is its bias. Kernels that store their
    bias permuted, or read it only when they are built, answer otherwise, and so are left alone.
    """
    if not hasattr(module, "bias") or not hasattr(module, "in_features"):
        return False
    if hasattr(module, "_hf_hook"):  # accelerate moves this module's tensors around by itself
        return False
    kind = (type(module), module.bias is None, vectors.device.type, dtype)
    if kind not in _ADDS_BIAS:
        zeros = torch.zeros(1, module.in_features, dtype=dtype, device=vectors.device)
        # Every value differs from its neighbours, and all are exact in half precision.
        step = torch.arange(vectors.shape[-1], dtype=dtype, device=vectors.device) % 61
        twin = copy_of(module)
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            plain = twin.forward(zeros)
            twin.register_buffer(KEY, step[None])
            MergedBias(twin, dtype)
            both = twin.forward(zeros)
        _ADDS_BIAS[kind] = torch.allclose(both - plain, step.to(plain.dtype), atol=0.25)
    return _ADDS_BIAS[kind]
