"""Optimum: ``GPTQQuantizer(..., bias_compensation=...)``, ``quantize_model``, ``save``, loading."""

from __future__ import annotations

from bc_plugin.names import KEY
from bc_plugin.toolkits.flag import flag_of, is_entry, set_flag
from bc_plugin.toolkits.load import attach_held, hold_for
from bc_plugin.toolkits.patch import Patch, Toolkit, argument
from bc_plugin.toolkits.run import CompensatedQuantization, calibration_is_ready


def _init(wrapped, quantizer, args, kwargs):
    wrapped(*args, **kwargs)
    set_flag(quantizer, kwargs.get(KEY))
    if hasattr(quantizer, KEY):
        quantizer.serialization_keys.append(KEY)


def _quantize_model(wrapped, quantizer, args, kwargs):
    config = flag_of(quantizer)
    if config is None:
        return wrapped(*args, **kwargs)
    with CompensatedQuantization(argument("model", 0, args, kwargs), config) as run:
        model = wrapped(*args, **kwargs)
    set_flag(quantizer, run.finish(model).entry())
    return model


def _save(wrapped, quantizer, args, kwargs):
    model = argument("model", 0, args, kwargs)
    config = getattr(model.config, "quantization_config", None)
    converts = quantizer.sym and getattr(quantizer, "format", None) == "gptq_v2"
    if converts and is_entry(getattr(quantizer, KEY, None)) and isinstance(config, dict):
        # Optimum writes the zero points of a symmetric model in the older format, and leaves the
        # newer one's name in config.json, so that loaders would misread them.
        config["format"] = "gptq"
    return wrapped(*args, **kwargs)


def _load_checkpoint(wrapped, instance, args, kwargs):
    # load_quantized_model itself may have been imported by name before enable().
    model = wrapped(*args, **kwargs)
    hold_for(model, argument("checkpoint", 1, args, kwargs))
    return model


def _post_init_model(wrapped, quantizer, args, kwargs):
    model = wrapped(*args, **kwargs)
    attach_held(model)
    return model


MODULE = "optimum.gptq.quantizer"
OPTIMUM = Toolkit(
    name="optimum",
    distribution="optimum",
    versions=("==2.0.*", ">=2.3,<2.4"),
    # Else GPTQConfig would swallow the flag without a word; and the GPTQ objects are theirs.
    needs=("transformers", "gptqmodel", "auto_gptq"),
    patches=(
        Patch(f"{MODULE}:GPTQQuantizer.__init__", _init, ("bits", "kwargs")),
        Patch(f"{MODULE}:GPTQQuantizer.quantize_model", _quantize_model, ("model", "tokenizer")),
        Patch(f"{MODULE}:prepare_dataset", calibration_is_ready, ("examples",)),
        Patch(f"{MODULE}:GPTQQuantizer.save", _save, ("model", "save_dir")),
        Patch(f"{MODULE}:load_checkpoint_and_dispatch", _load_checkpoint, ("checkpoint",)),
        Patch(f"{MODULE}:GPTQQuantizer.post_init_model", _post_init_model, ("model",)),
    ),
)
