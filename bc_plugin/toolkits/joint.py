"""GPTQ that knows a bias will follow.

The best bias for quantized weights Q is ``b = (W - Q) mu``, with mu the mean of the inputs. With it
in place the error of a linear is ``(W - Q) C (W - Q)^T``, where C is the covariance of the inputs
and not their second moment, so that is what GPTQ should minimise. This module takes the mean out
of what a toolkit's own GPTQ object accumulates, and lets the layers that follow see the bias. What
is stored in the end is the pass's own vectors, for the weights that GPTQ found.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BiasCompensationError
from ..marks import mark, mark_of, unmark
from ..models.blocks import Blocks
from ..models.experts import is_routed
from ..models.mixers import convolved_linears
from ..models.modules import linears_of
from ..models.positions import call_arguments, token_index, vector_rows
from ..models.tracker import PositionTracker
from ..ranks import add_up
from ..shift.descent import integers_and_scales


class JointGPTQ:
    """Bias-aware quantization of a model's blocks, while a toolkit's GPTQ runs through them.

    Args:
        model: The float model, about to be quantized.
        blocks: Where its blocks are.
        positions: Number of leading positions that the pass will set apart; here, the first one
            at most, since a mean of its own for each would leave little to be minimised.
    """

    def __init__(self, model: nn.Module, blocks: Blocks, positions: int) -> None:
        self.tracker = PositionTracker(min(positions, 1))
        self.quantized: set[str] = set()
        self.inputs: dict[str, CentredInputs] = {}
        self.handles: list[Any] = []
        self.weights: list[nn.Parameter] = []
        for name in blocks.names:
            block = model.get_submodule(name)
            self.handles.append(block.register_forward_pre_hook(self._observe, with_kwargs=True))
            without_vectors = convolved_linears(block)
            for path, linear in linears_of(block):
                # Without a vector nothing takes the mean out.
                if is_routed(path) or path in without_vectors:
                    continue
                # By its weight, since GPTQModel puts another module around it.
                inputs = CentredInputs(self, f"{name}.{path}")
                mark(linear.weight, inputs)
                self.inputs[inputs.name] = inputs
                self.weights.append(linear.weight)

    def _observe(self, block: nn.Module, args: tuple, kwargs: dict) -> None:
        arguments = call_arguments(block, args, kwargs)
        if args:
            arguments["hidden_states"] = args[0]
        self.tracker.enter(token_index(arguments))

    def add_bias(self, name: str, linear: nn.Module, bias: Tensor) -> None:
        """Show a quantized linear's bias, (positions + 1, features), to the layers that follow."""
        self.quantized.add(name)

        def hook(_: nn.Module, args: tuple, output: Tensor) -> Tensor:
            rows = _rows(self.tracker, output)
            return output + bias[rows].view(output.shape).to(output.dtype)

        self.handles.append(linear.register_forward_hook(hook))

    def stop(self) -> None:
        """Take everything out of the model again."""
        while self.handles:
            self.handles.pop().remove()
        while self.weights:
            unmark(self.weights.pop(), CentredInputs)


class CentredInputs:
    """The mean of one linear's inputs, and the inputs without it.

    A first estimate of the mean is taken out of every batch before the toolkit squares it, and the
    small rest out of the Hessian in the end, so that float32 does not lose the difference. The
    inputs of leading positions stay as they are: an attention sink has nothing but a mean, and
    weights that leave all of it to the bias gain nothing for the other tokens.
    """

    SUMS = ("total", "count")

    def __init__(self, joint: JointGPTQ, name: str) -> None:
        self.joint, self.name = joint, name
        self.estimate: Tensor | None = None
        self.total: Tensor | None = None
        self.count: Tensor | None = None
        self.covariance: Tensor | None = None  # while the toolkit rounds
        self.finished = False

    def centre(self, inputs: Tensor) -> Tensor:
        """``inputs``, (..., features), those of later positions without the estimate."""
        flat = inputs.reshape(-1, inputs.shape[-1]).to(torch.float64, copy=True)
        positions = self.joint.tracker.positions
        rows = _rows(self.joint.tracker, inputs, self.name)
        if self.total is None:
            self.total = flat.new_zeros((positions + 1, flat.shape[-1]))
            self.count = flat.new_zeros(positions + 1)
        self.total.index_add_(0, rows, flat)
        self.count += torch.bincount(rows, minlength=positions + 1)
        if self.estimate is None:
            self.estimate = self.mean()[-1]
        flat -= (rows == positions)[:, None] * self.estimate
        return flat.float().view(inputs.shape)

    def mean(self) -> Tensor:
        """The mean inputs, float64 (positions + 1, features)."""
        return self.total / self.count.clamp(min=1)[:, None]

    def finish(self, hessian: Tensor, samples: int) -> None:
        """Take the mean out of ``2 / samples * sum x x^T`` of the centred inputs, in place."""
        self.take_out(hessian, samples)
        self.keep_constant(hessian)

    def take_out(self, hessian: Tensor, samples: int) -> None:
        """The mean of all ranks, out of the part of the sum that this one has."""
        count, own = self.count[-1].clone(), self.mean()[-1] - self.estimate
        add_up(self)
        rest = self.mean()[-1] - self.estimate
        cross = count * own.outer(rest)
        taken = cross + cross.T - count * rest.outer(rest)
        hessian -= (2 / samples * taken).to(hessian)

    def keep_constant(self, hessian: Tensor) -> None:
        """A constant input has no variance left, and toolkits would drop its weights as dead."""
        diagonal = hessian.diagonal()
        floor = 1e-6 * diagonal.mean()
        diagonal[(diagonal < floor) & (self.mean()[-1] != 0).to(diagonal.device)] = floor
        self.covariance = hessian.clone()  # the toolkit changes its own
        self.finished = True

    def adopt(self, other: CentredInputs) -> None:
        """Take over the mean of a linear that is given the same inputs."""
        self.estimate, self.total, self.count = other.estimate, other.total, other.count

    def improve(
        self,
        linear: nn.Module,
        weight: Tensor,
        quantized: Tensor,
        scales: Tensor,
        groups: Tensor,
        low: Tensor,
        high: Tensor,
        stored: torch.dtype = torch.float16,
    ) -> tuple[Tensor, Tensor]:
        """Make better integers and scales of those that the toolkit has found.

        Args:
            linear: It has the orientation of ``weight`` and ``quantized``.
            weight, quantized: The float and the rounded weight.
            scales: (out_features, groups).
            groups: The group of each input channel, (in_features,).
            low, high: Least and largest integer less the zero point, (out_features, groups).
            stored: The type that scales are stored in.

        Returns:
            The rounded weight and the scales, shaped and typed as they were given.
        """
        covariance, self.covariance = self.covariance, None
        turned = not isinstance(linear, nn.Linear)  # transformers' Conv1D
        given, target = (each.T if turned else each for each in (quantized, weight))
        width, groups = given.shape[1], groups.long().to(scales.device)
        integers = (given.to(scales) / scales[:, groups]).round().nan_to_num(0.0, 0.0, 0.0)
        integers, better = integers_and_scales(
            target.to(scales.device),
            integers,
            scales,
            low,
            high,
            groups,
            covariance[:width, :width].to(scales.device),  # some toolkits pad it
            stored,
        )
        found = (integers * better[:, groups]).to(quantized)
        return (found.T if turned else found), better.to(scales)

    def follow(self, linear: nn.Module, weight: Tensor, quantized: Tensor) -> None:
        """Show the layers that follow the best bias for the quantized weight."""
        shift = weight.double() - quantized.double()
        if isinstance(linear, nn.Linear):  # transformers' Conv1D has it the other way round
            shift = shift.T
        self.joint.add_bias(self.name, linear, (self.mean().to(shift) @ shift).float())


def centred_inputs(linear: nn.Module) -> CentredInputs | None:
    """What a linear was given when a bias-aware run began; None outside of one."""
    return mark_of(linear.weight, CentredInputs)


def weight_of(linear: nn.Module) -> Tensor:
    """A copy of the weight, which quantizing overwrites."""
    return linear.weight.detach().clone()


def _rows(tracker: PositionTracker, values: Tensor, name: str = "") -> Tensor:
    """The row of each token of ``values`` as a toolkit quantizes, (tokens,).

    Raises:
        BiasCompensationError: they are other tokens than its block was given.
    """
    tokens = values.shape[:-1].numel()
    rows = tracker.rows
    if rows is not None and rows.numel() == tokens:
        return rows.to(values.device).flatten()
    if rows is None:
        return torch.full((tokens,), tracker.positions, device=values.device)
    if values.dim() == 3:  # one sequence, its padding taken out
        index = torch.arange(values.shape[1], device=values.device).expand(values.shape[:2])
        return vector_rows(index, tracker.positions).flatten()
    raise BiasCompensationError(
        f"{name} sees {tokens} of {rows.numel()} tokens, so their positions are unknown; quantize "
        "with bias_compensation={'positions': 0} or {'joint': False}."
    )
