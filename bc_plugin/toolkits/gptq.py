"""GPTQ with the bias in view: wrappers for GPTQModel's GPTQ object, which Optimum uses, too."""

from __future__ import annotations

from .joint import FloatInputs, centred_inputs, weight_of
from .patch import argument


def _inputs(gptq):
    # FOEM minimises something else.
    return centred_inputs(gptq.module) if type(gptq).__name__ in ("GPTQ", "GPTAQ") else None


def batch_is_added(wrapped, gptq, args, kwargs):
    inputs = _inputs(gptq)
    if inputs is None:
        return wrapped(*args, **kwargs)
    centred = inputs.centre(argument("inp", 0, args, kwargs))
    return wrapped(centred, *args[1:], **{k: v for k, v in kwargs.items() if k != "inp"})


def batch_is_added_to_both(wrapped, gptaq, args, kwargs):
    """GPTAQ has the float model's inputs in a list, and takes the first of it for each batch."""
    inputs = _inputs(gptaq)
    if inputs is not None:
        if inputs.float_inputs is None:
            inputs.float_inputs = FloatInputs(inputs)
        gptaq.native_inps[0] = inputs.float_inputs.centre(gptaq.native_inps[0])
    return batch_is_added(wrapped, gptaq, args, kwargs)


def hessian_is_adopted(wrapped, gptq, args, kwargs):
    wrapped(*args, **kwargs)
    inputs, leader = _inputs(gptq), argument("leader", 0, args, kwargs)
    if inputs is not None and leader is not gptq:
        inputs.adopt(_inputs(leader))


def hessian_is_finished(wrapped, gptq, args, kwargs):
    hessian = wrapped(*args, **kwargs)
    inputs = _inputs(gptq)
    if inputs is not None and not inputs.finished and inputs.estimate is not None:
        inputs.finish(hessian, gptq.nsamples)
    return hessian


def linear_is_quantized_for_float_outputs(wrapped, gptaq, args, kwargs):
    inputs = _inputs(gptaq)
    if inputs is not None and inputs.float_inputs is not None:
        inputs.float_inputs.take_out(gptaq.dXXT, gptaq.nsamples)
        inputs.finish(gptaq.H, gptaq.nsamples)
    return linear_is_quantized(wrapped, gptaq, args, kwargs)


def linear_is_quantized(wrapped, gptq, args, kwargs):
    inputs = _inputs(gptq)
    if inputs is None:
        return wrapped(*args, **kwargs)
    weight = weight_of(gptq.module)
    quantized, scales, zeros, groups, *rest = wrapped(*args, **kwargs)
    if inputs.finished:  # else it fell back to rounding, for want of calibration data
        if type(gptq.quantizer).__name__ == "Quantizer":  # others have integers of other kinds
            limits = -zeros, int(gptq.quantizer.maxq) - zeros
            quantized, scales = inputs.improve(
                gptq.module, weight, quantized, scales, groups, *limits
            )
        inputs.follow(gptq.module, weight, quantized)
    return (quantized, scales, zeros, groups, *rest)
