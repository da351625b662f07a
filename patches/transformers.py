"""transformers: ``GPTQConfig(bias_compensation=...)`` and ``from_pretrained``.

What quantizes is Optimum, and what saves the vectors is the model's own state dict.
"""

from __future__ import annotations

from pathlib import Path

from bc_plugin.errors import BiasCompensationError
from bc_plugin.marks import mark, unmark
from bc_plugin.names import KEY
from bc_plugin.supported import SUPPORTED
from bc_plugin.toolkits.flag import config_to_dict, flag_of, set_flag
from bc_plugin.toolkits.load import attach_around, files_read, fit_to, read_compensation
from bc_plugin.toolkits.patch import Patch, Toolkit, argument
from bc_plugin.vectors import Compensation

# Config


def _config_init(wrapped, config, args, kwargs):
    wrapped(*args, **kwargs)
    set_flag(config, kwargs.get(KEY))


def _config_from_dict(wrapped, cls, args, kwargs):
    settings = dict(argument("quantization_config_dict", 0, args, kwargs))
    entry = settings.pop(KEY, None)
    config = wrapped(settings)
    set_flag(config, entry)
    return config


# Quantizing


def _merge_configs(wrapped, instance, args, kwargs):
    if flag_of(argument("quantization_config_from_args", 1, args, kwargs)) is not None:
        raise BiasCompensationError(
            "bias_compensation was asked for, but the checkpoint is quantized already. Compensate "
            "it with bc_plugin.compensate(quantized_model, float_model, calibration), or with "
            "`bc-plugin compensate QUANTIZED FLOAT OUT` on the command line."
        )
    return wrapped(*args, **kwargs)


def _check_asked(quantizer):
    """What was asked for has to reach somebody who does it."""
    if flag_of(quantizer.quantization_config) is None:
        return
    if flag_of(getattr(quantizer, "optimum_quantizer", None)) is None:
        raise BiasCompensationError(
            f"bias_compensation was asked for, but {type(quantizer).__name__} cannot honour "
            "it. Quantize with GPTQConfig, or quantize first and compensate the result with "
            "bc_plugin.compensate."
        )


# Saving: nothing to do

# Loading


def _resolve_files(wrapped, instance, args, kwargs):
    files, metadata = wrapped(*args, **kwargs)
    files_read.set(tuple(map(Path, files or ())))
    return files, metadata


def _expect(model, pattern):
    """Keep transformers from reporting tensors as unexpected that are read here."""
    import transformers

    kind = list if transformers.__version__.startswith("4.") else set
    patterns = {*(model._keys_to_ignore_on_load_unexpected or ()), pattern}
    model._keys_to_ignore_on_load_unexpected = kind(patterns)


def _before_loading(wrapped, quantizer, args, kwargs):
    model = argument("model", 0, args, kwargs)
    result = wrapped(*args, **kwargs)
    if not quantizer.pre_quantized:
        _check_asked(quantizer)
        return result
    entry = getattr(quantizer.quantization_config, KEY, None)
    compensation = read_compensation(entry, files_read.get() or ())
    if compensation is not None:
        mark(model, fit_to(compensation, model))
        _expect(model, rf"\.{KEY}$")
    return result


def _after_loading(wrapped, quantizer, args, kwargs):
    model = argument("model", 0, args, kwargs)
    compensation = unmark(model, Compensation)
    return attach_around(lambda: wrapped(*args, **kwargs), model, compensation)


# Toolkit

CONFIGS = "transformers.utils.quantization_config"
AUTO = "transformers.quantizers.auto"
QUANTIZER = "transformers.quantizers.base:HfQuantizer"
TRANSFORMERS = Toolkit(
    name="transformers",
    supported=SUPPORTED["transformers"],
    needs=("optimum",),
    config=(
        Patch(f"{CONFIGS}:GPTQConfig.__init__", _config_init, ("kwargs",)),
        Patch(f"{CONFIGS}:CompressedTensorsConfig.to_dict", config_to_dict),
        Patch(
            f"{AUTO}:AutoQuantizationConfig.from_dict",
            _config_from_dict,
            ("quantization_config_dict",),
        ),
    ),
    quantizing=(
        Patch(
            f"{AUTO}:AutoHfQuantizer.merge_quantization_configs",
            _merge_configs,
            ("quantization_config", "quantization_config_from_args"),
        ),
    ),
    loading=(
        Patch("transformers.modeling_utils:_get_resolved_checkpoint_files", _resolve_files),
        Patch(f"{QUANTIZER}.preprocess_model", _before_loading, ("model", "kwargs")),
        Patch(f"{QUANTIZER}.postprocess_model", _after_loading, ("model",)),
    ),
)
