"""The pass on float blocks before a toolkit quantizes: afterwards, errors come hours too late."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..config import BiasCompensationConfig
from ..errors import BiasCompensationError
from ..models.blocks import Blocks
from ..models.calls import BlockCalls
from ..models.float_blocks import BlockSnapshot
from ..models.integers import integer_weights
from ..models.modules import copy_of, device_of, dtype_of, stored_tensors
from ..models.words import packed_integers
from ..shift.inside import check_finite, measure_block, measure_linears
from ..shift.rescaling import Rescaling
from ..shift.settle import settle
from ..shift.sites import linear_sites
from ..shift.statistics import Site

AsQuantized = Callable[[str, nn.Module], nn.Module]


class Rehearsal:
    """What a rehearsal goes through: all float blocks, one of each kind with its sites.

    Args:
        model: The float model.
        blocks: Where its blocks are.
        float_blocks: These blocks.
        as_quantized: Of a block's name and a copy of it, what quantizing will make of it, on the
            device it will run on; its weights do not matter.
        positions: Number of leading positions with a vector of their own.
        config: What was asked for.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Blocks,
        float_blocks: BlockSnapshot,
        as_quantized: AsQuantized,
        positions: int,
        config: BiasCompensationConfig,
    ) -> None:
        self.model, self.blocks, self.float_blocks = model, blocks, float_blocks
        self.as_quantized, self.positions = as_quantized, positions
        self.config = replace(config, keep_only_if_better=False)
        self.dtype = dtype_of(model)
        kinds = {_kind(float_blocks.skeletons[name]): name for name in reversed(blocks.names)}
        # The sites that no token has come to yet; None where a block has not been run.
        self.waiting: dict[str, set[str] | None] = dict.fromkeys(kinds.values())

    @torch.no_grad()
    def run(self, stream: Sequence[BlockCalls]) -> None:
        """Go through one batch, and through others only where that does not come to some site.

        Args:
            stream: Calls of the blocks, which are used up.

        Raises:
            BiasCompensationError: what the pass would raise, or the toolkit's kernels on the way.
        """
        batches = [calls for calls in stream if not calls.apart]
        # Padding first: that is what is hardest to tell apart in a site's tokens.
        batches.sort(key=lambda calls: int((calls.index >= 0).sum()) / calls.index.numel())
        with torch.compiler.set_stance("force_eager"):
            for calls in batches:
                self._go_through(calls)
                if not self.waiting:
                    return
        name = min(min(sites) for sites in self.waiting.values())
        settle(Site(name, "linear", self.positions), self.config, self.dtype)

    def _go_through(self, calls: BlockCalls) -> None:
        device = device_of(self.model)
        for number, name in enumerate(self.blocks.names):
            if name not in self.waiting:
                with self.float_blocks.load(name, device) as block:
                    calls.hidden = calls.run(block, number, device, dtype_of(block))
                check_finite(calls.hidden, name, "float")
                continue
            try:
                quantized = self._quantized(name)
                device = device_of(quantized)
                calls.hidden = self._measure(number, name, quantized, calls)
            except BiasCompensationError:
                raise
            except Exception as error:
                raise BiasCompensationError(
                    f"{name} cannot be run as it will be once it is quantized ({error}). Nothing "
                    "has been quantized yet; choose other settings, such as another group size or "
                    "backend, or a machine that has kernels for these."
                ) from error

    def _quantized(self, name: str) -> nn.Module:
        home = device_of(self.model.get_submodule(name))
        with self.float_blocks.load(name, home) as block:
            return self.as_quantized(name, copy.deepcopy(block)).eval()

    def _measure(self, number: int, name: str, quantized: nn.Module, calls: BlockCalls) -> Tensor:
        """The float block's output."""
        with self.float_blocks.load(name, device_of(quantized)) as reference:
            linears = linear_sites(reference, quantized)
            if "linear" not in self.config.sites:
                linears = []
            trained = self.config.refine_train if self.config.refine_steps else ()
            if self.config.scales or self.config.integers or "scales" in trained:
                found = integer_weights(quantized, linears, copy_of, self.dtype)
                for path in found if self.config.integers else ():
                    packed_integers(f"{name}.{path}", quantized.get_submodule(path), found[path])
            sites, outputs = measure_linears(
                name,
                number,
                reference,
                quantized,
                linears,
                [calls],
                self.positions,
                Rescaling(),
                self.dtype,
            )
        reached = {site.name for site in sites if site.fitted.total is not None}
        missing = {site.name for site in sites} - reached
        before = self.waiting.pop(name)
        if before is not None:
            missing &= before
        if missing:
            self.waiting[name] = missing
        if "block" in self.config.sites:
            own = {
                site.name.removeprefix(f"{name}."): settle(site, self.config, self.dtype)[0]
                for site in sites
                if site.name in reached
            }
            stream = [calls], self.positions
            measure_block(name, number, quantized, own, *stream, outputs, self.dtype)
        return outputs[0]


def _kind(block: nn.Module) -> tuple:
    """Alike for blocks of the same modules."""
    shapes = tuple((name, tensor.shape) for name, tensor in stored_tensors(block))
    return str(block), shapes
