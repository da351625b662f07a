"""Optimum: ``GPTQQuantizer(..., bias_compensation=...)``, ``quantize_model``, ``save``, loading."""

from __future__ import annotations

from contextvars import ContextVar

from bc_plugin.compensation import Compensation
from bc_plugin.loading import load_if_any
from bc_plugin.names import KEY
from bc_plugin.patching import Patch, Toolkit, argument
from bc_plugin.quantization import CompensatedQuantization, flag_of, is_entry, set_flag

# Functions deep inside a run find what belongs to it here.
_quantizing: ContextVar[CompensatedQuantization | None] = ContextVar("quantizing", default=None)
_loading: ContextVar[Compensation | None] = ContextVar("loading", default=None)


def _init(wrapped, quantizer, args, kwargs):
    wrapped(*args, **kwargs)
    set_flag(quantizer, kwargs.get(KEY))
    if hasattr(quantizer, KEY):
        quantizer.serialization_keys.append(KEY)


def _quantize_model(wrapped, quantizer, args, kwargs):
    config = flag_of(quantizer)
    if config is None:
        return wrapped(*args, **kwargs)
    run = CompensatedQuantization(argument("model", 0, args, kwargs), config)
    token = _quantizing.set(run)
    try:
        model = wrapped(*args, **kwargs)
    finally:
        _quantizing.reset(token)
    set_flag(quantizer, run.finish(model).entry())
    return model


def _prepare_dataset(wrapped, instance, args, kwargs):
    batches = wrapped(*args, **kwargs)
    run = _quantizing.get()
    if run is not None:
        run.start(batches)
    return batches


def _save(wrapped, quantizer, args, kwargs):
    model = argument("model", 0, args, kwargs)
    config = getattr(model.config, "quantization_config", None)
    if is_entry(getattr(quantizer, KEY, None)) and isinstance(config, dict):
        # Optimum writes the zero points of a symmetric model in the older format, and leaves the
        # newer one's name in config.json, so that loaders would misread them.
        if quantizer.sym and quantizer.format == "gptq_v2":
            config["format"] = "gptq"
    return wrapped(*args, **kwargs)


def _load_quantized_model(wrapped, instance, args, kwargs):
    compensation = load_if_any(argument("save_folder", 1, args, kwargs))
    token = _loading.set(compensation)
    try:
        model = wrapped(*args, **kwargs)
    finally:
        _loading.reset(token)
    if compensation is not None:
        compensation.attach_unchecked(model)
    return model


def _post_init_model(wrapped, quantizer, args, kwargs):
    compensation = _loading.get()
    if compensation is not None:
        # Now, because the kernels' initialisation may repack the weights the digest is taken of.
        compensation.check(argument("model", 0, args, kwargs))
    return wrapped(*args, **kwargs)


MODULE = "optimum.gptq.quantizer"
OPTIMUM = Toolkit(
    name="optimum",
    distribution="optimum",
    versions=">=2.3,<2.4",
    patches=(
        Patch(f"{MODULE}:GPTQQuantizer.__init__", _init, ("bits", "kwargs")),
        Patch(f"{MODULE}:GPTQQuantizer.quantize_model", _quantize_model, ("model", "tokenizer")),
        Patch(f"{MODULE}:prepare_dataset", _prepare_dataset, ("examples",)),
        Patch(f"{MODULE}:GPTQQuantizer.save", _save, ("model", "save_dir")),
        Patch(f"{MODULE}:load_quantized_model", _load_quantized_model, ("model", "save_folder")),
        Patch(f"{MODULE}:GPTQQuantizer.post_init_model", _post_init_model, ("model",)),
    ),
)
