"""What has to be known of GPTQ and AWQ while they run: wrappers, in place for one recipe."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from compressed_tensors.offload import update_offload_parameter
from torch import Tensor, nn

from ..marks import mark, mark_of, unmark
from ..ranks import wait_for_all
from ..supported import SUPPORTED
from ..toolkits.awq import record
from ..toolkits.joint import CentredInputs, JointGPTQ, weight_of
from ..toolkits.patch import Applied, Patch, Toolkit, argument


@contextmanager
def follow_gptq(model: nn.Module, joint: JointGPTQ) -> Iterator[None]:
    """While it lasts, linears are known by themselves: their weights may go to other devices."""
    linears = {model.get_submodule(name): inputs for name, inputs in joint.inputs.items()}
    for linear, inputs in linears.items():
        mark(linear, inputs)
    try:
        yield
    finally:
        for linear in linears:
            unmark(linear, CentredInputs)


def _inputs_are_added(wrapped: Any, gptq: Any, args: tuple, kwargs: dict) -> Any:
    module, given = argument("module", 0, args, kwargs), argument("args", 1, args, kwargs)
    inputs = mark_of(module, CentredInputs)
    if inputs is None:
        return wrapped(*args, **kwargs)
    return wrapped(module, (inputs.centre(given[0]), *given[1:]), *args[2:], **kwargs)


def _linears_are_quantized(wrapped: Any, gptq: Any, args: tuple, kwargs: dict) -> Any:
    """Around all of it: every rank has a share of each Hessian, and the weights in the end."""
    joint = _joint(gptq._hessians)
    for module, inputs in joint:
        # Hessians are sums here; the toolkit divides them by the number of samples later.
        inputs.take_out(gptq._hessians[module], 1)
    weights = [weight_of(module) for module, _ in joint]
    wait_for_all()  # offloaded weights are shared, and others write into them
    result = wrapped(*args, **kwargs)
    wait_for_all()  # the toolkit itself does not, and would go on with weights not yet written
    for (module, inputs), weight in zip(joint, weights, strict=True):
        inputs.follow(module, weight, weight_of(module))
    return result


def _hessians_are_used(wrapped: Any, gptq: Any, args: tuple, kwargs: dict) -> Any:
    """Around the linears that this rank quantizes, whose Hessians are whole by now."""
    modules = list(argument("module_list", 0, args, kwargs))
    joint = _joint(modules)
    for module, inputs in joint:
        inputs.keep_constant(gptq._hessians[module])
    weights = [weight_of(module) for module, _ in joint]
    result = wrapped(modules)
    for (module, inputs), weight in zip(joint, weights, strict=True):
        _improve(module, inputs, weight)
    return result


@torch.no_grad()
def _improve(module: nn.Module, inputs: CentredInputs, weight: Tensor) -> None:
    """Make better integers and scales of those found, where they are integers, in groups of inputs.

    Others are not in groups of inputs (blocks, tensors), or no integers (of 4 or 8 bits in floats).
    """
    settings = module.quantization_scheme.weights
    if settings.type != "int" or settings.strategy not in ("group", "channel"):
        inputs.covariance = None
        return
    scales, zeros, width = module.weight_scale.data, module.weight_zero_point.data, weight.shape[1]
    groups = getattr(module, "weight_g_idx", None)
    if groups is None or bool((groups < 0).any()):
        groups = torch.arange(width) // (width // scales.shape[1])
    least = -(2 ** (settings.num_bits - 1))
    limits = (limit - zeros.float() for limit in (least, -least - 1))
    rounded, better = inputs.improve(
        module, weight, module.weight.data, scales, groups, *limits, stored=scales.dtype
    )
    update_offload_parameter(module, "weight", rounded)
    update_offload_parameter(module, "weight_scale", better)


def _joint(modules: Iterable[nn.Module]) -> list[tuple[nn.Module, CentredInputs]]:
    found = [(module, mark_of(module, CentredInputs)) for module in modules]
    return [(module, inputs) for module, inputs in found if inputs is not None]


def _scales_are_found(wrapped: Any, awq: Any, args: tuple, kwargs: dict) -> Any:
    from llmcompressor.core import active_session

    scales = wrapped(*args, **kwargs)  # the toolkit applies them next
    mapping, model = argument("mapping", 0, args, kwargs), active_session().state.model
    parts = mapping.smooth_name.split(".")
    for end in range(1, len(parts)):
        block = ".".join(parts[:end])
        inside = [name.removeprefix(f"{block}.") for name in mapping.balance_names]
        source = ".".join(parts[end:])
        record(model.get_submodule(block), [(source, inside, scales)])
    return scales


GPTQ = "llmcompressor.modifiers.gptq.base:GPTQModifier"
AWQ = "llmcompressor.modifiers.transform.awq.base:AWQModifier"
WHILE_IT_RUNS = Toolkit(
    name="llmcompressor",
    supported=SUPPORTED["llmcompressor"],
    quantizing=(
        Patch(f"{GPTQ}.calibrate_module", _inputs_are_added, ("module", "args")),
        Patch(f"{GPTQ}.compress_modules", _linears_are_quantized),
        Patch(f"{GPTQ}.compress_module_list", _hessians_are_used, ("module_list",)),
        Patch(f"{AWQ}._compute_best_scale", _scales_are_found, ("mapping",)),
    ),
)


@contextmanager
def patched() -> Iterator[None]:
    """While it lasts, GPTQ's and AWQ's modifiers tell of what they do."""
    with ExitStack() as stack:
        for patch in WHILE_IT_RUNS.patches:
            applied = Applied(WHILE_IT_RUNS, patch)
            applied.apply()
            stack.callback(applied.undo)
        yield
