"""The pass: float and quantized blocks side by side, from the first to the last."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .calibration.batches import calibration_batches
from .calibration.stream import prepare_stream
from .config import BiasCompensationConfig
from .errors import BiasCompensationError
from .models.blocks import find_block_lists, find_blocks
from .models.float_blocks import BlockSnapshot, float_blocks_of
from .models.modules import copy_of, device_of, dtype_of
from .models.positions import PositionTracker
from .names import KEY
from .shift.inside import measure_block, measure_linears
from .shift.outside import measure_outside
from .shift.rescaling import Rescaling
from .shift.settle import settle
from .shift.sites import RESCALED, linear_sites, others_changed, sites_outside
from .shift.statistics import Site
from .vectors.attach import AttachedSite
from .vectors.check import weights_digest
from .vectors.compensation import Compensation
from .vectors.contents import SiteErrors


def compensate(
    quantized_model: nn.Module,
    float_model: nn.Module | BlockSnapshot,
    calibration: Iterable[Any],
    config: BiasCompensationConfig | dict | bool = True,
    *,
    rescalings: Mapping[str, Rescaling] | None = None,
    copy_to_run: Callable[[nn.Module], nn.Module] = copy_of,
) -> Compensation:
    """Compute the vectors that take the mean shift out of a quantized model.

    Block i of both models is fed the float model's input of block i. The linears of a block are
    compensated first, each fed the float linear's input; then the block, with those in place
    (Gong et al., arXiv 2404.01892).

    A model may have several lists of blocks: stages, as in Swin, or an encoder and a decoder, as in
    DETR. Each list starts from what the float model gives it, and ``positions`` has to be 0.
    Convolutions outside of the blocks (patch embeddings) and the linears between stages are fed
    the float model's own inputs, too; every place counts there, padding of images included.
    Heads are no sites, be they a language model's, classifiers or box predictors.

    Args:
        quantized_model: Left as it was; use ``Compensation.attach`` on it afterwards.
        float_model: A model with the same modules' names, or a snapshot of its blocks, which takes
            one list of blocks and nothing outside of them.
        calibration: Model inputs: dicts of tensors (or single tensors) with the batch first.
        config: Settings, as in a toolkit's ``bias_compensation`` keyword.
        rescalings: For blocks of the quantized model, the scales that AWQ moved within them.
            Without that record only the blocks' outputs of such a model are compensated.
        copy_to_run: Makes of a quantized block the copy that is run.

    Returns:
        The vectors and the error of each site before and after.

    Raises:
        BiasCompensationError: the models do not match; the calibration data is empty, all
            padding or too short for the positions; the positions of a site's tokens are unknown,
            as in windowed or cross-attention; an output is not finite.
    """
    config = BiasCompensationConfig.parse(config) or BiasCompensationConfig()
    if any(KEY in module._buffers for module in quantized_model.modules()):
        raise BiasCompensationError(
            "the quantized model is compensated already; detach its compensation first."
        )
    start = time.perf_counter()
    models = [m for m in (quantized_model, float_model) if isinstance(m, nn.Module)]
    training = [model.training for model in models]
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        try:
            for model in models:
                model.eval()
            work = _Pass(
                quantized_model, float_model, calibration, config, rescalings or {}, copy_to_run
            )
            compensation = work.run()
        finally:
            for model, mode in zip(models, training, strict=True):
                model.train(mode)
    compensation.seconds = time.perf_counter() - start
    return compensation


class _Pass:
    """What one call of ``compensate`` goes through."""

    def __init__(
        self,
        model: nn.Module,
        float_model: nn.Module | BlockSnapshot,
        calibration: Iterable[Any],
        config: BiasCompensationConfig,
        rescalings: Mapping[str, Rescaling],
        copy_to_run: Callable[[nn.Module], nn.Module],
    ) -> None:
        self.model, self.float_model, self.config = model, float_model, config
        self.calibration = list(calibration)
        self.rescalings, self.copy_to_run = rescalings, copy_to_run
        self.live = isinstance(float_model, nn.Module)
        self.lists = (
            find_block_lists(model, config.blocks)
            if self.live
            else (find_blocks(model, config.blocks),)  # a snapshot has the blocks of one list
        )
        self.paths = [blocks.path for blocks in self.lists]
        self.dtype = dtype_of(model)
        self.source = float_blocks_of(float_model)
        if self.live and find_block_lists(float_model, self.paths) != self.lists:
            raise BiasCompensationError("the two models have different numbers of blocks.")
        if len(self.lists) > 1 and config.positions != 0:
            raise BiasCompensationError(
                f"{type(model).__name__} has {len(self.lists)} lists of blocks: {self.paths}. "
                "Their tokens are different ones, in different numbers, and no class token leads "
                f"all of them, so positions={config.positions!r} has no meaning; use positions=0."
            )
        self.vectors: dict[str, Tensor] = {}
        self.kinds: dict[str, str] = {}
        self.errors: dict[str, SiteErrors] = {}
        self.changed = False
        self.rescaled = False

    def run(self) -> Compensation:
        """Compensate what is outside of the blocks, then block after block."""
        if self.live and "linear" in self.config.sites:
            self._compensate_outside()
        for blocks in self.lists:
            # The float stream starts in front of the first block, in what quantizers leave alone;
            # in front of a later list stand blocks, too, but then the float model is at hand.
            start = self.float_model if self.live else self.model
            self.stream, self.positions = prepare_stream(
                start, blocks, self.calibration, self.config, checked=self.live
            )
            for number, name in enumerate(tqdm(blocks.names, desc="Compensating blocks")):
                self._compensate_block(number, name)
        if not self.changed:
            raise BiasCompensationError(
                "there is nothing to compensate: the linears of both models are the same. Pass the "
                "quantized model first, then the float model it came from."
            )
        if not self.vectors and not self.config.keep_only_if_better:
            raise BiasCompensationError(
                "no linear that was quantized has an output that can be compared. Add 'block' to "
                "the sites: the vectors of the blocks stand for them."
            )
        if self.rescaled and "linear" in self.config.sites:
            warnings.warn(RESCALED, stacklevel=4)
        return Compensation(
            vectors=self.vectors,
            kinds=self.kinds,
            errors=self.errors,
            positions=self.positions,
            blocks=self.paths,
            digest=weights_digest(self.model, self.paths, self.vectors),
        )

    def _compensate_outside(self) -> None:
        """The sites outside of the blocks. No other site depends on their vectors."""
        kinds = sites_outside(self.float_model, self.model, self.lists)
        if not kinds:
            return
        fitted, apart = calibration_batches(self.calibration, self.config)
        sites = measure_outside(
            self.float_model,
            {name: self.copy_to_run(self.model.get_submodule(name)) for name in kinds},
            kinds,
            fitted,
            apart,
            self.config.positions == "all",
            self.dtype,
        )
        for name in kinds:
            if name in sites:
                self.changed = True
                self._keep(sites[name])
            else:
                tqdm.write(f"{name}: left out, the calibration data never reaches it")

    def _compensate_block(self, number: int, name: str) -> None:
        """A block's linears, then the block itself with those in place."""
        quantized = self.copy_to_run(self.model.get_submodule(name))
        with self.source.load(name, device_of(quantized)) as reference:
            changed = linear_sites(reference, quantized)
            self.changed |= bool(changed)
            sites, outputs = measure_linears(
                name,
                number,
                reference,
                quantized,
                self._comparable(name, changed, reference, quantized),
                self.stream,
                self.positions,
                self.rescalings.get(name, Rescaling()),
                self.dtype,
            )
        kept = [site for site in sites if self._keep(site)]
        if "block" in self.config.sites and changed:
            self._keep(self._measured_block(number, name, quantized, kept, outputs))
        for calls, output in zip(self.stream, outputs, strict=True):
            calls.hidden = output

    def _measured_block(
        self,
        number: int,
        name: str,
        quantized: nn.Module,
        linears: Iterable[Site],
        references: list[Tensor],
    ) -> Site:
        tracker = PositionTracker(self.positions)
        with ExitStack() as attached:
            for site in linears:
                module = quantized.get_submodule(site.name.removeprefix(f"{name}."))
                in_place = AttachedSite(module, self.vectors[site.name], tracker, self.dtype)
                attached.callback(in_place.detach)
            return measure_block(
                name, number, quantized, self.stream, references, tracker, self.dtype
            )

    def _comparable(
        self, name: str, changed: list[str], reference: nn.Module, quantized: nn.Module
    ) -> list[str]:
        """The linears whose output stands for that of the float linear."""
        if "linear" not in self.config.sites:
            return []
        rescaling = self.rescalings.get(name, Rescaling())
        if not rescaling.inputs and others_changed(reference, quantized):
            self.rescaled = True
            return []
        return [path for path in changed if path not in rescaling.outputs]

    def _keep(self, site: Site) -> bool:
        """Make vectors of a site's statistics; whether they are kept."""
        found = settle(site, self.config, self.dtype)
        if found is not None:
            self.kinds[site.name] = site.kind
            self.vectors[site.name], self.errors[site.name] = found
        return found is not None
