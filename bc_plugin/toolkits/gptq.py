"""GPTQ with the bias in view: wrappers for GPTQModel's GPTQ object, which Optimum uses, too."""

from __future__ import annotations

from .joint import centred_inputs, weight_of
from .patch import argument


def _inputs(gptq):
    # Its subclasses (GPTAQ, FOEM) minimise something else.
    return centred_inputs(gptq.module) if type(gptq).__name__ == "GPTQ" else None


def batch_is_added(wrapped, gptq, args, kwargs):
    inputs = _inputs(gptq)
    if inputs is None:
        return wrapped(*args, **kwargs)
    centred = inputs.centre(argument("inp", 0, args, kwargs))
    return wrapped(centred, *args[1:], **{k: v for k, v in kwargs.items() if k != "inp"})


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
