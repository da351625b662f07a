"""Vectors in place: added to a module's output, or merged into its bias.

A site's vectors, in the shape that ``Compensation`` gives them, are a buffer ``bias_compensation``
on the site's own module, so whatever saves or moves the model saves and moves them too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import BiasCompensationError
from ..models.arguments import with_hidden
from ..models.forwards import ReplacedForward
from ..models.tracker import PositionTracker
from ..names import KEY
from .merge import MergedBias, kernel_adds_bias


class VectorsBuffer:
    """A site's vectors as a buffer of its module, until ``undo``.

    They are saved in the type they have here, even if the model was cast to another since.
    """

    def __init__(self, module: nn.Module, vectors: Tensor) -> None:
        self.vectors = vectors
        module.register_buffer(KEY, vectors)
        self.handle = module.register_state_dict_post_hook(self)

    def __call__(self, module: nn.Module, state: dict, prefix: str, metadata: Any) -> None:
        saved = state.get(prefix + KEY)
        if saved is not None and saved.dtype != self.vectors.dtype:
            state[prefix + KEY] = self.vectors.to(saved.device)

    def undo(self, module: nn.Module) -> None:
        """Take them out of the module."""
        self.handle.remove()
        delattr(module, KEY)


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
        self.buffer = VectorsBuffer(module, vectors)
        self.merged = MergedBias(module, dtype) if mergeable else None
        self.forward = None
        if self.merged is None or tracker.positions > 0:
            self.forward = CompensatedForward(module, tracker, self.merged is not None)

    def detach(self) -> None:
        """Put the module back as it was."""
        if self.forward is not None:
            self.forward.undo(self.module)
        if self.merged is not None:
            self.merged.undo(self.module)
        self.buffer.undo(self.module)


class AttachedConvolution:
    """The vectors of a convolution, in place until ``detach``.

    Args:
        module: The quantized convolution.
        vectors: (1, channels), or (patches, channels) with patches row by row.
    """

    def __init__(self, module: nn.Module, vectors: Tensor) -> None:
        self.module = module
        self.buffer = VectorsBuffer(module, vectors)
        self.forward = CompensatedConvolution(module)

    def detach(self) -> None:
        """Put the module back as it was."""
        self.forward.undo(self.module)
        self.buffer.undo(self.module)


class CompensatedForward(ReplacedForward):
    """A module's forward, with each token's row of the module's vectors added to the output."""

    def __init__(self, module: nn.Module, tracker: PositionTracker, shared_is_merged: bool) -> None:
        super().__init__(module)
        self.tracker = tracker
        self.shared_is_merged = shared_is_merged
        self.made: tuple[Any, Any, Any] = (None, None, None)

    def run(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The module's output, compensated."""
        output = self.plain(module, *args, **kwargs)
        if self.undone:
            return output
        alone = isinstance(output, Tensor)
        hidden = output if alone else output[0]
        rows = self.tracker.rows_of(hidden)
        if rows is None and self.shared_is_merged:
            return output
        added = self._add(module, hidden, rows)
        return added if alone else with_hidden(output, added)

    def _add(self, module: nn.Module, hidden: Tensor, rows: Tensor | None) -> Tensor:
        shared, table = self._ready(module._buffers[KEY], hidden)
        added = hidden + (shared if rows is None else functional.embedding(rows, table))
        return added if added.dtype == hidden.dtype else added.to(hidden.dtype)

    def _ready(self, vectors: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The last row, and all rows, where and as they are added to ``hidden``.

        Made once, since single tokens are decoded fast, and kept as one tuple, so that threads see
        all of it or nothing.
        """
        if torch.compiler.is_compiling():
            return self._make(vectors, hidden)
        version = 0 if vectors.is_inference() else vectors._version
        made_of, made_for, ready = self.made
        if made_of is not vectors or made_for != (version, hidden.dtype, hidden.device):
            ready = self._make(vectors.detach().clone(), hidden)
            self.made = (vectors, (version, hidden.dtype, hidden.device), ready)
        return ready

    def _make(self, vectors: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        vectors = vectors.to(hidden.device)
        shared = vectors[-1].to(torch.promote_types(vectors.dtype, hidden.dtype))
        if self.shared_is_merged:
            wide = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
            vectors = wide - wide[-1]
        return shared, vectors.to(hidden.dtype)


class CompensatedConvolution(ReplacedForward):
    """A convolution's forward, with the vectors added along the channel axis."""

    def run(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The module's output, (..., channels, height, width), compensated.

        Raises:
            BiasCompensationError: each patch has a vector, and there are more or fewer patches.
        """
        output = self.plain(module, *args, **kwargs)
        if self.undone:
            return output
        vectors = getattr(module, KEY).to(output.device)
        height, width = output.shape[-2:] if len(vectors) > 1 else (1, 1)
        if height * width != len(vectors):
            raise BiasCompensationError(
                f"images are cut into {height * width} patches, but the compensation has vectors "
                f"for {len(vectors)}; resize images to the size it was calibrated with, or compute "
                "one with positions=1."
            )
        return (output + vectors.T.view(-1, height, width)).to(output.dtype)
