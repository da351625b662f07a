"""Bias compensation as a modifier, after the one that quantizes."""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from dataclasses import fields, replace
from typing import Any, Literal

import torch
from llmcompressor.core import Event, State
from llmcompressor.modifiers import Modifier
from pydantic import Field, PrivateAttr, model_validator

from ..config import BiasCompensationConfig
from ..errors import BiasCompensationError
from ..ranks import are_several, require_same, together, wait_for_all
from ..shift.messages import AUTOROUND, OTHER_RANKS
from ..toolkits.run import CompensatedQuantization, left_plain
from ..vectors import Compensation
from ..vectors.weights import weights_of
from .compressed import compressed
from .quantizing import follow_gptq, patched
from .recipe import quantizers_before
from .saving import save_compensated

DEFAULT = BiasCompensationConfig()
NOT_FOR_MODELS = ("labels", "loss_mask")  # llm-compressor's own use, and a loss nobody asks for


class BiasCompensationModifier(Modifier):
    """Compensates what the modifiers before it in the recipe have quantized.

    The settings are those of ``bc_plugin.BiasCompensationConfig``, which says more of each. The
    float blocks are kept when the recipe is initialized: read from the model's folder again where
    they stand there, copied to the CPU where they do not. The vectors are computed when the recipe
    is finalized, and attached to the model, whose weights are compressed by then; as ever, they are
    decompressed when the model is first run. ``model.save_pretrained`` writes both. Of several
    ranks each has its share of the data; what is computed is computed from the sums over all.

    Args:
        joint: None and True let ``GPTQModifier`` know that biases will follow. For any other
            quantizer True is an error, and None changes nothing.
        native: Let ``save_pretrained`` write biases as the architecture has them, which vLLM loads
            without the plugin; see ``bc_plugin.export``. Only with ``positions=0``.

    Raises:
        BiasCompensationError: a setting is out of range; nothing before the modifier quantizes
            weights; there is no calibration data; several ranks are to refine, or have quantized
            apart; or whatever ``bc_plugin.compensate`` raises.
    """

    requires_calibration_data: bool = True

    positions: int | Literal["all"] = DEFAULT.positions
    sites: list[str] = Field(default_factory=lambda: list(DEFAULT.sites))
    joint: bool | None = None
    scales: bool = DEFAULT.scales
    integers: bool = DEFAULT.integers
    blocks: str | list[str] | None = DEFAULT.blocks
    held_out: float = DEFAULT.held_out
    keep_only_if_better: bool = DEFAULT.keep_only_if_better
    max_tokens: int | Literal["auto"] | None = DEFAULT.max_tokens
    batch_tokens: int = DEFAULT.batch_tokens
    offload_activations: bool = DEFAULT.offload_activations
    refine_steps: int = DEFAULT.refine_steps
    refine: Literal["model", "block"] = DEFAULT.refine
    refine_train: list[str] | Literal["auto"] = DEFAULT.refine_train
    dtype: str = DEFAULT.dtype
    native: bool = False

    _run: CompensatedQuantization | None = PrivateAttr(default=None)
    _until_finalized: ExitStack = PrivateAttr(default_factory=ExitStack)

    @model_validator(mode="after")
    def _settings_are_checked(self) -> BiasCompensationModifier:
        self._config()
        if self.native and self.positions != 0:
            raise BiasCompensationError(
                f"BiasCompensationModifier: native=True with positions={self.positions!r}; plain "
                "biases hold one vector for all positions, pass positions=0."
            )
        return self

    def _config(self) -> BiasCompensationConfig:
        values = {field.name: getattr(self, field.name) for field in fields(DEFAULT)}
        return BiasCompensationConfig(**values | {"joint": self.joint is not False})

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Check recipe and data, and keep the float blocks, before anything is quantized."""
        quantizers = quantizers_before(self)
        config = replace(self._config(), joint=self._joins(quantizers))
        if any(type(each).__name__ == "AutoRoundModifier" for each in quantizers):
            warnings.warn(AUTOROUND, stacklevel=2)
        if Compensation.attached_to(state.model) is not None:
            raise BiasCompensationError(
                "the model is compensated already; start from the float model, or detach it "
                "first: bc_plugin.Compensation.attached_to(model).detach(model)."
            )
        batches = _batches(state)
        with ExitStack() as stack:
            stack.enter_context(together())
            if self.refine_steps and are_several():
                raise BiasCompensationError(
                    "BiasCompensationModifier: refine_steps with several ranks, which have weights "
                    "in common here. Leave it out, and refine what is saved: `torchrun "
                    "--nproc-per-node N -m bc_plugin refine`, or in one process."
                )
            stack.enter_context(patched())
            self._run = stack.enter_context(
                CompensatedQuantization(state.model, config, lambda _, block: block)
            )
            self._run.start(batches)
            if self._run.joint is not None:
                stack.enter_context(follow_gptq(state.model, self._run.joint))
            self._until_finalized = stack.pop_all()
        return True

    def _joins(self, quantizers: list[Modifier]) -> bool:
        others = [type(q).__name__ for q in quantizers if type(q).__name__ != "GPTQModifier"]
        if self.joint and (others or "linear" not in self.sites):
            raise BiasCompensationError(
                f"BiasCompensationModifier: joint=True cannot be honoured by {others[0]}, "
                "only by GPTQModifier; leave joint out."
                if others
                else "BiasCompensationModifier: joint=True needs linear among the sites."
            )
        return self.joint is not False and not others

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        """Nothing yet: in some pipelines quantization is still switched off here."""

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        """Compute the vectors, attach them, and let ``save_pretrained`` write them."""
        run, self._run = self._run, None
        with self._until_finalized:
            if run is None or not self.ended_:  # the recipe was given up half way
                return True
            if are_several():
                wait_for_all()
                # Compressed, a weight that its rank alone has quantized may be another's.
                require_same(weights_of(state.model, [run.blocks.path]), OTHER_RANKS)
            with left_plain(run, state.model), compressed(state.model):
                run.finish(state.model)
        save_compensated(state.model, self.native)
        return True


def _batches(state: State) -> list[dict[str, Any]]:
    """The calibration data, which the model is called with; on the CPU."""
    if state.data.calib is None:
        raise BiasCompensationError(
            "BiasCompensationModifier needs calibration data, and there is none: pass a dataset to "
            "oneshot. (The data-free pipeline has none.)"
        )
    # Samplers draw from the global generator: the quantizer is to draw the same as without us.
    with torch.random.fork_rng(devices=[]):
        return [
            {key: value for key, value in batch.items() if key not in NOT_FOR_MODELS}
            for batch in state.data.calib
        ]
