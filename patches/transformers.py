"""transformers: ``GPTQConfig(bias_compensation=...)`` and ``from_pretrained``.

What quantizes is Optimum, and what saves the vectors is the model's own state dict.
"""

from __future__ import annotations

from pathlib import Path

from bc_plugin.config import BiasCompensationConfig
from bc_plugin.errors import BiasCompensationError
from bc_plugin.marks import mark, unmark
from bc_plugin.names import KEY, SUFFIX
from bc_plugin.supported import SUPPORTED
from bc_plugin.toolkits.flag import asked_by, config_to_dict, flag_of, is_entry, set_flag
from bc_plugin.toolkits.load import (
    attach_around,
    files_read,
    fit_to,
    read_compensation,
    reading_config,
    reading_weights,
)
from bc_plugin.toolkits.patch import Patch, Toolkit, argument
from bc_plugin.toolkits.save import saved_whole
from bc_plugin.toolkits.zero_points import zero_points_as_labelled
from bc_plugin.vectors import Compensation
from bc_plugin.vectors.entry import set_entry
from bc_plugin.vectors.joint import entry_to_save, note_saved_without
from bc_plugin.vectors.sealed import unseal

# Config


def _config_init(wrapped, config, args, kwargs):
    """Every config of transformers swallows a keyword that it does not know."""
    from transformers import AwqConfig, GPTQConfig

    kwargs = unseal(kwargs)
    flag = kwargs.pop(KEY, None)
    # In transformers 5 AwqConfig is a GPTQConfig, but nobody quantizes with it.
    honoured = isinstance(config, GPTQConfig) and not isinstance(config, AwqConfig)
    if not honoured and not is_entry(flag) and BiasCompensationConfig.parse(flag) is not None:
        raise _cannot_honour(config)
    wrapped(*args, **kwargs)
    set_flag(config, flag)


def _cannot_honour(config):
    return BiasCompensationError(
        f"bias_compensation was asked for, but nobody who quantizes with {type(config).__name__} "
        "compensates on the way. Quantize with GPTQConfig; or quantize without bias_compensation, "
        "and compensate the result: compensation = bc_plugin.compensate(quantized_model, "
        "float_model, calibration), then compensation.attach(quantized_model)."
    )


def _config_from_dict(wrapped, cls, args, kwargs):
    settings = unseal(argument("quantization_config_dict", 0, args, kwargs))
    entry = settings.pop(KEY) if is_entry(settings.get(KEY)) else None
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
    config = quantizer.quantization_config
    if asked_by(config) is None:
        return
    if flag_of(getattr(quantizer, "optimum_quantizer", None)) is None:
        raise _cannot_honour(config)


# Saving


def _save_pretrained(wrapped, model, args, kwargs):
    with saved_whole(model, argument("save_directory", 0, args, kwargs)):
        if entry_to_save(model) is None:
            return wrapped(*args, **kwargs)
        with zero_points_as_labelled(model):
            return wrapped(*args, **kwargs)


def _revert_names(wrapped, instance, args, kwargs):
    # A vector's name is its site's: what is read back is looked for under that.
    state = argument("state_dict", 1, args, kwargs)
    vectors = {name: state[name] for name in list(state) if name.endswith(SUFFIX)}
    if not vectors:
        return wrapped(*args, **kwargs)
    rest = {name: tensor for name, tensor in state.items() if name not in vectors}
    return {**wrapped(argument("model", 0, args, kwargs), rest), **vectors}


# Loading


def _read_config(wrapped, cls, args, kwargs):
    with reading_config(argument("pretrained_model_name_or_path", 0, args, kwargs)):
        return wrapped(*args, **kwargs)


def _resolve_files(wrapped, instance, args, kwargs):
    with reading_weights(argument("pretrained_model_name_or_path", 0, args, kwargs)):
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
    note_saved_without(entry, model)
    compensation = read_compensation(entry, files_read.get() or ())
    if compensation is not None:
        mark(model, fit_to(compensation, model))
        _expect(model, rf"\.{KEY}$")
    return result


def _load_plain(wrapped, cls, args, kwargs):
    """A model that no toolkit quantized: no quantizer is asked before and after."""
    model = argument("model", 0, args, kwargs)
    files = argument("checkpoint_files", 2, args, kwargs) or ()
    if getattr(model.config, "quantization_config", None) is None:
        entry = getattr(model.config, KEY, None)
        note_saved_without(entry, model)
        compensation = read_compensation(entry, files)
        if compensation is not None:
            mark(model, fit_to(compensation, model))
            _expect(model, rf"\.{KEY}$")
    return wrapped(*args, **kwargs)


def _from_pretrained(wrapped, cls, args, kwargs):
    result = wrapped(*args, **kwargs)
    model = result[0] if isinstance(result, tuple) else result
    compensation = unmark(model, Compensation)
    if compensation is not None:
        compensation.attach(model)
    return result


def _after_loading(wrapped, quantizer, args, kwargs):
    model = argument("model", 0, args, kwargs)
    compensation = unmark(model, Compensation)
    result = attach_around(lambda: wrapped(*args, **kwargs), model, compensation)
    made = None if quantizer.pre_quantized else Compensation.attached_to(model)
    if made is not None:  # once it has quantized, GptqHfQuantizer gives the model another config
        set_entry(model, made.entry())
    return result


# Toolkit

CONFIGS = "transformers.utils.quantization_config"
AUTO = "transformers.quantizers.auto"
MODEL = "transformers.modeling_utils:PreTrainedModel"
QUANTIZER = "transformers.quantizers.base:HfQuantizer"
TRANSFORMERS = Toolkit(
    name="transformers",
    supported=SUPPORTED["transformers"],
    needs=("optimum",),
    config=(
        Patch(f"{CONFIGS}:QuantizationConfigMixin+.__init__", _config_init),
        Patch(f"{CONFIGS}:CompressedTensorsConfig.to_dict", config_to_dict),
        Patch(f"{CONFIGS}:GPTQConfig.to_dict", config_to_dict),
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
    saving=(
        Patch(f"{MODEL}.save_pretrained", _save_pretrained, ("save_directory",)),
        Patch(
            "transformers.modeling_utils:revert_weight_conversion",
            _revert_names,
            ("model", "state_dict"),
            versions=">=5",
        ),
    ),
    loading=(
        Patch(
            "transformers.configuration_utils:PretrainedConfig.get_config_dict",
            _read_config,
            ("pretrained_model_name_or_path",),
        ),
        Patch(f"{MODEL}.from_pretrained", _from_pretrained),
        Patch(f"{MODEL}._load_pretrained_model", _load_plain, ("model", "checkpoint_files")),
        Patch("transformers.modeling_utils:_get_resolved_checkpoint_files", _resolve_files),
        Patch(f"{QUANTIZER}.preprocess_model", _before_loading, ("model", "kwargs")),
        Patch(f"{QUANTIZER}.postprocess_model", _after_loading, ("model",)),
    ),
)
