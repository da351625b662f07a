"""What has to be known of GPTQ and AWQ while they run: wrappers, in place for one recipe."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from ..marks import mark, mark_of, unmark
from ..models.blocks import Blocks
from ..models.modules import linears_of
from ..supported import SUPPORTED
from ..toolkits.awq import record
from ..toolkits.joint import CentredInputs, centred_inputs, weight_of
from ..toolkits.patch import Applied, Patch, Toolkit, argument


@contextmanager
def follow_gptq(model: nn.Module, blocks: Blocks) -> Iterator[None]:
    """While it lasts, linears are known by themselves: their weights may go to other devices."""
    linears = [
        linear for name in blocks.names for _, linear in linears_of(model.get_submodule(name))
    ]
    for linear in linears:
        inputs = centred_inputs(linear)
        if inputs is not None:
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
    modules = list(argument("module_list", 0, args, kwargs))
    joint = [(module, mark_of(module, CentredInputs)) for module in modules]
    joint = [(module, inputs) for module, inputs in joint if inputs is not None]
    for module, inputs in joint:
        # Hessians are sums here; the toolkit divides them by the number of samples later.
        inputs.finish(gptq._hessians[module], 1)
    weights = [weight_of(module) for module, _ in joint]
    result = wrapped(modules)
    for (module, inputs), weight in zip(joint, weights, strict=True):
        inputs.follow(module, weight, weight_of(module))
    return result


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
        Patch(f"{GPTQ}.compress_module_list", _linears_are_quantized, ("module_list",)),
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
