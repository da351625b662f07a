"""A toolkit's quantization with compensation around it, the same for all of them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..calibration.stream import prepare_stream
from ..compensate import compensate
from ..config import BiasCompensationConfig
from ..errors import BiasCompensationError
from ..marks import mark, unmark
from ..models.blocks import find_blocks
from ..models.calls import call_model
from ..models.float_blocks import BlockSnapshot
from ..models.modules import copy_of, device_of
from ..refine import record_float_logits, train_vectors
from ..refinement.config import RefinementConfig
from ..refinement.float_logits import FloatLogits
from ..shift.rescaling import Rescaling
from ..vectors.compensation import Compensation
from ..vectors.entry import set_entry
from ..vectors.joint import entry_to_save, mark_joint
from .joint import JointGPTQ
from .rehearse import AsQuantized, Rehearsal

R = TypeVar("R")

# Functions deep inside a toolkit's run find what belongs to it here.
_running: ContextVar[CompensatedQuantization | None] = ContextVar("running", default=None)


class CompensatedQuantization:
    """Bias compensation around one run of a toolkit's quantization, a context manager.

    Args:
        model: The float model, about to be overwritten.
        config: What was asked for.
        as_quantized: As ``run_compensated`` has it.
    """

    def __init__(
        self, model: nn.Module, config: BiasCompensationConfig, as_quantized: AsQuantized
    ) -> None:
        self.model, self.config, self.as_quantized = model, config, as_quantized
        self.blocks = find_blocks(model, config.blocks)
        self.calibration: list[dict[str, Any]] | None = None
        self.float_blocks: BlockSnapshot | None = None
        self.joint: JointGPTQ | None = None
        self.rescalings: dict[str, Rescaling] = {}
        self.refinement: RefinementConfig | None = None
        if config.refine_steps:
            self.refinement = RefinementConfig(
                steps=config.refine_steps, by=config.refine, train=config.refine_train
            )
        self.float_logits: FloatLogits | None = None

    def __enter__(self) -> CompensatedQuantization:
        self._token = _running.set(self)
        self._scratch = tempfile.TemporaryDirectory()
        return self

    def __exit__(self, *exception: Any) -> None:
        _running.reset(self._token)
        self._scratch.cleanup()
        self._leave_model()

    def _leave_model(self) -> None:
        if self.joint is not None:
            self.joint.stop()
        for name in self.rescalings:
            unmark(self.model.get_submodule(name), Rescaling)

    def start(self, calibration: Sequence[Mapping[str, Any] | Tensor]) -> None:
        """Check the calibration data and keep the float weights, before anything is quantized."""
        self.calibration = [
            {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
            for batch in calibration
        ]
        self.float_blocks = BlockSnapshot(self.model, self.blocks)
        positions = self._check(self.float_blocks)
        if self.refinement is not None and self.refinement.by == "model":
            self.float_logits = record_float_logits(
                self.model, self.calibration, self.refinement, folder=self._scratch.name
            )
        if self.config.joint and "linear" in self.config.sites:
            self.joint = JointGPTQ(self.model, self.blocks, positions)
        for name in self.blocks.names:
            self.rescalings[name] = Rescaling()
            mark(self.model.get_submodule(name), self.rescalings[name])

    @torch.no_grad()
    def _check(self, float_blocks: BlockSnapshot) -> int:
        """Find out in seconds what would otherwise fail after hours; returns the positions."""
        stream, positions = prepare_stream(self.model, self.blocks, self.calibration, self.config)
        logits = call_model(self.model, self.calibration[0], device_of(self.model))[0]
        if not bool(torch.isfinite(logits).all()):
            raise BiasCompensationError(
                "the float model's output on the first calibration sequence is not finite (type "
                f"{logits.dtype}); load it in bfloat16 or float32 before quantizing."
            )
        Rehearsal(
            self.model, self.blocks, float_blocks, self.as_quantized, positions, self.config
        ).run(stream)
        return positions

    @property
    def is_joint(self) -> bool:
        """Whether any linear was quantized jointly."""
        return self.joint is not None and bool(self.joint.quantized)

    def finish(
        self, quantized: nn.Module, copy_to_run: Callable[[nn.Module], nn.Module] = copy_of
    ) -> Compensation:
        """Compute the compensation and attach it.

        Args:
            copy_to_run: As ``run_compensated`` has it.
        """
        if self.calibration is None or self.float_blocks is None:
            raise BiasCompensationError(
                "the toolkit quantized the model without preparing calibration data; bias "
                "compensation needs it. Compensate afterwards with bc_plugin.compensate."
            )
        self._leave_model()
        if self.joint is not None and self.joint.quantized:
            mark_joint(quantized, self.joint.quantized)
        compensation = compensate(
            quantized,
            self.float_blocks,
            self.calibration,
            self.config,
            rescalings=self.rescalings,
            copy_to_run=copy_to_run,
        )
        if self.refinement is not None:
            compensation = train_vectors(
                quantized,
                compensation,
                self.float_logits or self.float_blocks,
                self.calibration,
                self.refinement,
                copy_to_run=copy_to_run,
            )
        compensation.attach(quantized)
        return compensation


def run_compensated(
    quantize: Callable[[], R],
    model: nn.Module,
    config: BiasCompensationConfig | None,
    outcome: Callable[[R], nn.Module],
    as_quantized: AsQuantized,
    copy_to_run: Callable[[nn.Module], nn.Module] = copy_of,
) -> R:
    """A toolkit's quantization, with compensation where it was asked for.

    Args:
        quantize: The toolkit's own call; returns what is returned.
        model: The float model, about to be overwritten.
        config: What was asked for, if anything.
        outcome: From what ``quantize`` returned, the quantized model.
        as_quantized: Of a block's name and a copy of it, what ``quantize`` will make of it, on the
            device it will run on; its weights do not matter. Called before ``quantize`` begins.
        copy_to_run: Makes of a quantized block a copy that computes what the block will compute
            once it was saved and loaded.

    Raises:
        BiasCompensationError: it cannot be compensated. In most cases this is known before anything
            is quantized; where it is not, the error's ``model`` is the quantized model.
    """
    if config is None:
        return quantize()
    with CompensatedQuantization(model, config, as_quantized) as run:
        result = quantize()
        quantized = outcome(result)
        with left_plain(run, quantized):
            run.finish(quantized, copy_to_run)
    return result


@contextmanager
def left_plain(run: CompensatedQuantization, quantized: nn.Module) -> Iterator[None]:
    """What fails here leaves a quantized model that says of itself what it is."""
    try:
        yield
    except BaseException as error:
        attached = Compensation.attached_to(quantized)
        if attached is not None:
            attached.detach(quantized)
        set_entry(quantized, entry_to_save(quantized))
        if not isinstance(error, Exception):  # Ctrl-C, for one
            raise
        loads = "with bc_plugin, which warns of it" if run.is_joint else "like any other"
        failure = BiasCompensationError(
            f"the model is quantized, but could not be compensated: {error}\nIt is left without "
            f"compensation, and can be saved and loaded {loads}; it is this error's `model`, "
            "too. Compensate it then with bc_plugin.compensate or `bc-plugin compensate`"
            + (
                ", its linears at least: GPTQ knew that their biases would follow (joint), and "
                "without those its weights are worse than plain ones."
                if run.is_joint
                else "."
            )
        )
        failure.model = quantized
        raise failure from error


def is_running() -> bool:
    """Whether a toolkit is quantizing with the option."""
    return _running.get() is not None


def calibration_is_ready(wrapped, instance, args, kwargs):
    """Wrapper for the function that prepares a toolkit's calibration data: a run starts with it."""
    batches = wrapped(*args, **kwargs)
    run = _running.get()
    if run is not None and run.calibration is None:
        run.start(batches)
    return batches
