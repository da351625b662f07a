"""Optimum: ``GPTQQuantizer(..., bias_compensation=...)``, ``quantize_model``, ``save``, loading."""

from __future__ import annotations

import copy
from itertools import chain

from bc_plugin.models.modules import device_of
from bc_plugin.names import KEY
from bc_plugin.supported import SUPPORTED
from bc_plugin.toolkits.flag import asked_by, is_entry, set_flag
from bc_plugin.toolkits.load import attach_held, hold_for
from bc_plugin.toolkits.patch import Patch, Toolkit, argument
from bc_plugin.toolkits.run import calibration_is_ready, run_compensated
from bc_plugin.toolkits.save import saved_whole
from bc_plugin.vectors.joint import entry_to_save
from bc_plugin.vectors.sealed import unseal

# Config


def _init(wrapped, quantizer, args, kwargs):
    kwargs = unseal(kwargs)
    wrapped(*args, **kwargs)
    set_flag(quantizer, kwargs.get(KEY))
    if is_entry(getattr(quantizer, KEY, None)):  # a request is nobody's who reads a checkpoint
        quantizer.serialization_keys.append(KEY)


# Quantizing


def _quantize_model(wrapped, quantizer, args, kwargs):
    model = argument("model", 0, args, kwargs)
    return run_compensated(
        lambda: wrapped(*args, **kwargs),
        model,
        asked_by(quantizer),
        lambda quantized: quantized,
        lambda _, block: _as_quantized(block, quantizer, model),
    )


def _as_quantized(block, quantizer, model):
    from optimum.gptq.utils import get_layers

    quantizer = copy.copy(quantizer)  # on which kernels are noted
    chosen = quantizer.modules_in_block_to_quantize or [get_layers(block)]
    device_map = getattr(model, "hf_device_map", {"": device_of(block)})
    quantizer.select_quant_linear(device_map=device_map, pack=True)
    quantizer._replace_by_quant_layers(block, list(chain.from_iterable(chosen)))
    return quantizer.post_init_model(block)


# Saving


def _save(wrapped, quantizer, args, kwargs):
    model, folder = argument("model", 0, args, kwargs), argument("save_dir", 1, args, kwargs)
    if entry_to_save(model) is None:
        return wrapped(*args, **kwargs)
    config = getattr(model.config, "quantization_config", None)
    converts = quantizer.sym and getattr(quantizer, "format", None) == "gptq_v2"
    if converts and isinstance(config, dict):
        # Optimum writes the zero points of a symmetric model in the older format, and leaves the
        # newer one's name in config.json, so that loaders would misread them.
        config["format"] = "gptq"
    with saved_whole(model, folder):
        return wrapped(*args, **kwargs)


# Loading


def _load_checkpoint(wrapped, instance, args, kwargs):
    # load_quantized_model itself may have been imported by name before enable().
    model = wrapped(*args, **kwargs)
    hold_for(model, argument("checkpoint", 1, args, kwargs))
    return model


def _post_init_model(wrapped, quantizer, args, kwargs):
    model = wrapped(*args, **kwargs)
    attach_held(model)
    return model


# Toolkit

MODULE = "optimum.gptq.quantizer"
QUANTIZER = f"{MODULE}:GPTQQuantizer"
OPTIMUM = Toolkit(
    name="optimum",
    supported=SUPPORTED["optimum"],
    # Else GPTQConfig would swallow the flag without a word; and the GPTQ objects are theirs.
    needs=("transformers", "gptqmodel", "auto_gptq"),
    config=(Patch(f"{QUANTIZER}.__init__", _init, ("bits", "kwargs")),),
    quantizing=(
        Patch(f"{QUANTIZER}.quantize_model", _quantize_model, ("model", "tokenizer")),
        Patch(f"{MODULE}:prepare_dataset", calibration_is_ready, ("examples",)),
    ),
    saving=(Patch(f"{QUANTIZER}.save", _save, ("model", "save_dir")),),
    loading=(
        Patch(f"{MODULE}:load_checkpoint_and_dispatch", _load_checkpoint, ("checkpoint",)),
        Patch(f"{QUANTIZER}.post_init_model", _post_init_model, ("model",)),
    ),
)
