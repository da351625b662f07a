"""The pass: float and quantized blocks side by side, from the first to the last."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from tqdm.auto import tqdm

from .calibration.batches import calibration_batches
from .calibration.items import checked_items, vocabulary_of
from .calibration.stream import prepare_stream
from .config import BiasCompensationConfig
from .errors import BiasCompensationError
from .models.blocks import find_block_lists, find_blocks
from .models.float_blocks import BlockSnapshot, float_blocks_of
from .models.modules import copy_of, device_of, dtype_of, evaluating
from .models.offloaded import lent, require_in_memory
from .models.repacked import require_as_stored
from .names import KEY
from .ranks import add_up, are_several, require_same
from .shift.autoround import is_autoround
from .shift.fitting import FittedWeights
from .shift.inside import measure_block, measure_linears
from .shift.messages import (
    AUTOROUND,
    NOTHING_COMPARABLE,
    ONLY_EXPERTS,
    OTHER_RANKS,
    RESCALED,
    UNCHANGED,
    about_experts,
    require_one_list,
)
from .shift.outside import measure_outside
from .shift.rescaling import Rescaling
from .shift.same_model import require_model, require_same_model
from .shift.settle import settle
from .shift.sites import (
    changed_experts,
    comparable,
    linear_sites,
    require_same_block,
    sites_outside,
)
from .shift.statistics import Site
from .streaming.load import open_streamed
from .vectors.compensation import Compensation
from .vectors.contents import SiteErrors
from .vectors.joint import joint_linears, require_linears
from .vectors.weights import are_kept, weights_of


def compensate(
    quantized_model: nn.Module | str | Path,
    float_model: nn.Module | BlockSnapshot | str | Path,
    calibration: Iterable[Any],
    config: BiasCompensationConfig | dict | bool = True,
    *,
    rescalings: Mapping[str, Rescaling] | None = None,
    copy_to_run: Callable[[nn.Module], nn.Module] = copy_of,
    only: Callable[[str], bool] = lambda name: True,
) -> Compensation:
    """Compute the vectors that take the mean shift out of a quantized model.

    Block i of both models is fed the float model's input of block i. The linears of a block are
    compensated first, each fed the float linear's input; then the block, with those in place
    (Gong et al., arXiv 2404.01892).

    A model may have several lists of blocks: stages, as in Swin, or an encoder and a decoder, as in
    DETR. Each list starts from what the float model gives it, and ``positions`` has to be 0.
    Convolutions outside of the blocks (patch embeddings) and the linears between stages are fed
    the float model's own inputs, too; every place counts there, padding of images included.
    Heads are no sites, be they a language model's, classifiers' or box predictors'.

    A folder in the place of a model is never loaded whole: blocks are read from its safetensors
    files one after the other, see ``bc_plugin.streaming.load.open_streamed``.

    Args:
        quantized_model: Left as it was, but for its linears' scales if ``scales`` is asked for, and
            their integers as well if ``integers`` is. Use ``Compensation.attach`` on it afterwards.
            Or the folder of its checkpoint, of GPTQ's or AWQ's; ``Compensation.save`` puts the
            vectors beside it.
        float_model: A model with the same modules' names, or its folder, or a snapshot of its
            blocks, which takes one list of blocks and nothing outside of them.
        calibration: Model inputs: dicts of tensors (or single tensors) with the batch first.
        config: Settings, as in a toolkit's ``bias_compensation`` keyword.
        rescalings: For blocks of the quantized model, the scales that AWQ moved within them.
            Without that record only the blocks' outputs of such a model are compensated.
        copy_to_run: Makes of a quantized block the copy that is run.
        only: Whether a site, by its name, is to be compensated, for what cannot hold a vector
            everywhere. A block then is measured with what the others leave.

    Returns:
        The vectors and the error of each site before and after. Weights that were quantized jointly
        with their linears' vectors keep one for each of those linears.

    Raises:
        BiasCompensationError: the quantized model was not quantized from this float model, or it
            was jointly, and linears would be left without vectors; the calibration data is empty,
            all padding or too short for the positions; the positions of a site's tokens are
            unknown, as in windowed or cross-attention; an output is not finite; scales or integers
            were asked for, and cannot be told from each other, or there is only a folder to hold
            them. They are then as they were. A folder's format is unknown here, or its files are
            damaged.
    """
    config = BiasCompensationConfig.parse(config) or BiasCompensationConfig()
    if (config.scales or config.integers) and isinstance(quantized_model, (str, Path)):
        what = "integers" if config.integers else "scales"
        raise BiasCompensationError(
            f"{what}=True: {quantized_model} is left as it is, so the {what} would be lost. Use "
            f"`bc-plugin compensate --{what}`, which writes them, or pass the loaded model."
        )
    quantized_model, float_model = (
        open_streamed(model, blocks=config.blocks) if isinstance(model, (str, Path)) else model
        for model in (quantized_model, float_model)
    )
    if any(KEY in module._buffers for module in quantized_model.modules()):
        raise BiasCompensationError(
            "the quantized model is compensated already; detach its compensation first."
        )
    start = time.perf_counter()
    fitted = FittedWeights(copy_to_run, config.scales, config.integers)
    with evaluating(quantized_model, float_model), fitted:
        compensation = _Pass(
            quantized_model, float_model, calibration, config, rescalings or {}, fitted, only
        ).run()
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
        fitted: FittedWeights,
        only: Callable[[str], bool],
    ) -> None:
        self.model, self.float_model, self.config = model, float_model, config
        self.calibration = checked_items(calibration, vocabulary_of(model, float_model))
        self.rescalings, self.fitted, self.copy_to_run = rescalings, fitted, fitted.copy_to_run
        self.only = only
        self.live = require_model(float_model)
        self.lists = (
            find_block_lists(model, config.blocks)
            if self.live
            else (find_blocks(model, config.blocks),)  # a snapshot has the blocks of one list
        )
        self.paths = [blocks.path for blocks in self.lists]
        require_in_memory(model, self.paths)
        self.dtype = dtype_of(model)
        self.source = float_blocks_of(float_model)
        if self.live:
            require_same_model(model, float_model, self.lists)
        self.joint = joint_linears(model)
        if "linear" not in config.sites:
            require_linears(self.joint, (), "keep linear among the sites.")
        require_one_list(model, self.paths, config.positions)
        self.vectors: dict[str, Tensor] = {}
        self.kinds: dict[str, str] = {}
        self.errors: dict[str, SiteErrors] = {}
        self.changed = self.rescaled = False
        self.experts, self.kernels = list[str](), set[type]()

    def run(self) -> Compensation:
        """Compensate what is outside of the blocks, then block after block."""
        if are_several():  # a digest takes its time
            require_same(weights_of(self.model, self.paths), OTHER_RANKS)
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
                with lent(self.model, name):
                    self._compensate_block(number, name)
        if self.experts and "linear" in self.config.sites:
            tqdm.write(about_experts(self.experts))
        if not self.changed:
            raise BiasCompensationError(ONLY_EXPERTS if self.experts else UNCHANGED)
        if not self.vectors and not self.config.keep_only_if_better:
            why = RESCALED if self.rescaled else NOTHING_COMPARABLE
            raise BiasCompensationError(f"no site is left to compensate: {why}")
        if self.rescaled:
            warnings.warn(RESCALED, stacklevel=4)
        if is_autoround(self.model):
            warnings.warn(AUTOROUND, stacklevel=4)
        joint = self.joint | self.fitted.conclude(self.model)
        require_linears(joint, self.vectors, "pass the float model that they were made from.")
        return Compensation(
            vectors=self.vectors,
            kinds=self.kinds,
            errors=self.errors,
            positions=self.positions,
            blocks=self.paths,
            joint=bool(joint),
            scales=bool(self.fitted.before),
            **asdict(weights_of(self.model, self.paths, self.vectors)),
        )

    def _compensate_outside(self) -> None:
        """The sites outside of the blocks. No other site depends on their vectors."""
        found = sites_outside(self.float_model, self.model, self.lists)
        kinds = {name: kind for name, kind in found.items() if self.only(name)}
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
        _add_up(sites.values())
        for name in kinds:
            if name not in sites:
                tqdm.write(f"{name}: left out, the calibration data never reaches it")
                continue
            self.changed = True
            if sites[name].agreement.is_missing:
                self.rescaled = True
            else:
                self._keep(sites[name])

    def _compensate_block(self, number: int, name: str) -> None:
        """A block's linears, then the block itself with those in place."""
        own, moved = self.model.get_submodule(name), self.rescalings.get(name, Rescaling())
        quantized = self.copy_to_run(own)
        if not are_kept(self.model):
            require_as_stored(own, name, quantized, self.kernels)
        with self.source.load(name, device_of(quantized)) as reference:
            changed = linear_sites(reference, quantized)
            experts = changed_experts(reference, quantized)
            wanted = changed if "linear" in self.config.sites else []
            wanted = [path for path in wanted if self.only(f"{name}.{path}")]
            linears = comparable(reference, quantized, wanted, moved)
            settings = linears, self.stream, self.positions, moved, self.dtype
            if self.fitted.fit(name, number, reference, own, *settings):
                quantized = self.copy_to_run(own)
            sites, outputs = measure_linears(name, number, reference, quantized, *settings)
            _add_up(sites)
        self.experts += [f"{name}.{path}" for path in experts]
        stood_for = "block" in self.config.sites and bool(changed or experts) and self.only(name)
        self.changed |= bool(changed) or stood_for
        others = not moved.inputs and any(site.agreement.is_missing for site in sites)
        if others:
            sites = []  # scales were moved, or weights rotated: the others' inputs are others, too
            self.fitted.undo(f"{name}.")
            quantized = self.copy_to_run(own)
        self.rescaled |= others or (bool(wanted) and not linears)
        kept = [site.name for site in sites if self._keep(site)]
        if stood_for:
            linear = {path.removeprefix(f"{name}."): self.vectors[path] for path in kept}
            settings = linear, self.stream, self.positions, outputs, self.dtype
            block = measure_block(name, number, quantized, *settings)
            _add_up([block])
            if not sites:
                require_same_block(block)
            self._keep(block)
        for each, output in zip(self.stream, outputs, strict=True):
            each.hidden = output

    def _keep(self, site: Site) -> bool:
        """Make vectors of a site's statistics; whether they are kept."""
        relied_on = site.name in self.joint or site.name in self.fitted.before
        found = settle(site, self.config, self.dtype, may_drop=not relied_on)
        if found is not None:
            self.kinds[site.name] = site.kind
            self.vectors[site.name], self.errors[site.name] = found
        return found is not None


def _add_up(sites: Iterable[Site]) -> None:
    """What ranks that act as one have measured, so that all of them go on alike."""
    add_up(*(statistics for site in sites for statistics in site.statistics))
