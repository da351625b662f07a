"""Vectors in place: added to a module's output, or merged into its bias.

A site's vectors, in the shape that ``Compensation`` gives them, are a buffer ``bias_compensation``
on the site's own module, so whatever saves or moves the model saves and moves them too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BiasCompensationError
from ..models.calls import copy_of
from ..models.positions import PositionTracker, rows_of
from ..names import VECTOR

BASE = "bias_without_compensation"


class AttachedSite:
    """The vectors of one site, in place until ``detach``.

    Args:
        module: The quantized linear, or the block.
        vectors: (positions + 1, features).
        tracker: Tells which row each token uses; shared by all sites of a model.
        dtype: The type the model computes in.
    """

    def __init__(
        self, module: nn.Module, vectors: Tensor, tracker: PositionTracker, dtype: torch.dtype
    ) -> None:
        self.module = module
        mergeable = kernel_adds_bias(module, vectors, dtype)
        module.register_buffer(VECTOR, vectors)
        self.merged = MergedBias(module, dtype) if mergeable else None
        self.forward = None
        if self.merged is None or tracker.positions > 0:
            self.forward = CompensatedForward(module, tracker, self.merged is not None)

    def detach(self) -> None:
        """Put the module back as it was."""
        if self.forward is not None:
            self.forward.undo()
        if self.merged is not None:
            self.merged.undo(self.module)
        delattr(self.module, VECTOR)


class AttachedConvolution:
    """The vectors of a convolution, in place until ``detach``.

    Args:
        module: The quantized convolution.
        vectors: (1, channels), or (patches, channels) with patches row by row.
    """

    def __init__(self, module: nn.Module, vectors: Tensor) -> None:
        self.module = module
        module.register_buffer(VECTOR, vectors)
        self.forward = CompensatedConvolution(module)

    def detach(self) -> None:
        """Put the module back as it was."""
        self.forward.undo()
        delattr(self.module, VECTOR)


class ReplacedForward:
    """Something in place of a module's forward, until ``undo``.

    Rather than a hook: hooks take PyTorch's slow path, which costs more than adding a vector when
    single tokens are decoded, and run in an order of their own.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.replaced = vars(module).get("forward")  # accelerate puts one there, too
        self.plain = module.forward
        self.undone = False
        module.forward = self.run

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """What is called in the forward's place."""
        raise NotImplementedError

    def undo(self) -> None:
        """Give the module its own forward back."""
        if vars(self.module).get("forward") != self.run:
            self.undone = True  # something else has wrapped it since and holds on to it
        elif self.replaced is None:
            del self.module.forward
        else:
            self.module.forward = self.replaced


class CompensatedForward(ReplacedForward):
    """A module's forward, with each token's row of the module's vectors added to the output."""

    def __init__(self, module: nn.Module, tracker: PositionTracker, shared_is_merged: bool) -> None:
        super().__init__(module)
        self.tracker = tracker
        self.shared_is_merged = shared_is_merged

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output, compensated."""
        output = self.plain(*args, **kwargs)
        rows = self.tracker.rows
        if (rows is None and self.shared_is_merged) or self.undone:
            return output
        if isinstance(output, tuple):
            return (self._add(output[0], rows), *output[1:])
        return self._add(output, rows)

    def _add(self, hidden: Tensor, rows: Tensor | None) -> Tensor:
        vectors = getattr(self.module, VECTOR).to(hidden.device)
        if rows is None:
            return (hidden + vectors[-1]).to(hidden.dtype)
        if self.shared_is_merged:
            wide = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
            vectors = wide - wide[-1]
        return hidden + vectors.to(hidden.dtype)[rows_of(rows, hidden)]


class CompensatedConvolution(ReplacedForward):
    """A convolution's forward, with the vectors added along the channel axis."""

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output, (..., channels, height, width), compensated.

        Raises:
            BiasCompensationError: each patch has a vector, and there are more or fewer patches.
        """
        output = self.plain(*args, **kwargs)
        if self.undone:
            return output
        vectors = getattr(self.module, VECTOR).to(output.device)
        height, width = output.shape[-2:] if len(vectors) > 1 else (1, 1)
        if height * width != len(vectors):
            raise BiasCompensationError(
                f"images are cut into {height * width} patches, but the compensation has vectors "
                f"for {len(vectors)}; resize images to the size it was calibrated with, or compute "
                "one with positions=1."
            )
        return (output + vectors.T.view(-1, height, width)).to(output.dtype)


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
        module.register_buffer(BASE, None if base is None else base.detach(), persistent=False)
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
        base, shared = getattr(module, BASE), getattr(module, VECTOR)[-1]
        wide = shared.to(torch.promote_types(shared.dtype, torch.float32))
        bias = wide if base is None else wide + base.to(wide)
        current = module.bias
        module.bias = bias.to(self.dtype if current is None else current.dtype)

    @staticmethod
    def _save_base(module: nn.Module, state: dict, prefix: str, metadata: Any) -> None:
        state[prefix + "bias"] = getattr(module, BASE)

    @staticmethod
    def _load_base(module: nn.Module, state: dict, prefix: str, *rest: Any) -> None:
        if prefix + "bias" in state:
            getattr(module, BASE).copy_(state.pop(prefix + "bias"))

    def undo(self, module: nn.Module) -> None:
        """Give the module its own bias back."""
        for handle in self.handles:
            handle.remove()
        base = getattr(module, BASE)
        delattr(module, BASE)
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
            twin.register_buffer(VECTOR, step[None])
            MergedBias(twin, dtype)
            both = twin.forward(zeros)
        _ADDS_BIAS[kind] = torch.allclose(both - plain, step.to(plain.dtype), atol=0.25)
    return _ADDS_BIAS[kind]
