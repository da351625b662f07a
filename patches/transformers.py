"""transformers: ``GPTQConfig(bias_compensation=...)`` and ``from_pretrained``."""

from __future__ import annotations

from contextvars import ContextVar

from bc_plugin.errors import BiasCompensationError
from bc_plugin.names import KEY
from bc_plugin.toolkits.flag import config_to_dict, flag_of, set_flag
from bc_plugin.toolkits.load import fit_to, read_compensation
from bc_plugin.toolkits.patch import Patch, Toolkit, argument

# The files of the checkpoint that from_pretrained is about to read.
_files: ContextVar[tuple[str, ...]] = ContextVar("files", default=())


def _config_init(wrapped, config, args, kwargs):
    wrapped(*args, **kwargs)
    set_flag(config, kwargs.get(KEY))


def _config_from_dict(wrapped, cls, args, kwargs):
    settings = dict(argument("quantization_config_dict", 0, args, kwargs))
    entry = settings.pop(KEY, None)
    config = wrapped(settings)
    set_flag(config, entry)
    return config


def _merge_configs(wrapped, instance, args, kwargs):
    if flag_of(argument("quantization_config_from_args", 1, args, kwargs)) is not None:
        raise BiasCompensationError(
            "bias_compensation was asked for, but the checkpoint is quantized already. Compensate "
            "it with bc_plugin.compensate(quantized_model, float_model, calibration), or with "
            "`bc-plugin compensate QUANTIZED FLOAT OUT` on the command line."
        )
    return wrapped(*args, **kwargs)


def _resolve_files(wrapped, instance, args, kwargs):
    files, metadata = wrapped(*args, **kwargs)
    _files.set(tuple(files or ()))
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
    quantizer.compensation = None
    if quantizer.pre_quantized:
        entry = getattr(quantizer.quantization_config, KEY, None)
        compensation = read_compensation(entry, _files.get())
        if compensation is not None:
            quantizer.compensation = fit_to(compensation, model)
            _expect(model, rf"\.{KEY}$")
    elif flag_of(quantizer.quantization_config) is not None:
        toolkit = getattr(quantizer, "optimum_quantizer", None)
        if flag_of(toolkit) is None:
            raise BiasCompensationError(
                f"bias_compensation was asked for, but {type(quantizer).__name__} cannot honour "
                "it. Quantize with GPTQConfig, or quantize first and compensate the result with "
                "bc_plugin.compensate."
            )
    return result


def _after_loading(wrapped, quantizer, args, kwargs):
    model = argument("model", 0, args, kwargs)
    compensation = getattr(quantizer, "compensation", None)
    if compensation is None:
        return wrapped(*args, **kwargs)
    # Before the kernels' own initialisation, which may repack the weights the digest is taken of.
    compensation.check(model)
    result = wrapped(*args, **kwargs)
    compensation.attach_unchecked(model)
    return result


BASE = "transformers.quantizers.base:HfQuantizer"
TRANSFORMERS = Toolkit(
    name="transformers",
    distribution="transformers",
    versions=("==4.57.*", ">=5.16,<5.24"),
    needs=("optimum",),
    patches=(
        Patch(
            "transformers.utils.quantization_config:GPTQConfig.__init__", _config_init, ("kwargs",)
        ),
        Patch(
            "transformers.utils.quantization_config:CompressedTensorsConfig.to_dict",
            config_to_dict,
        ),
        Patch(
            "transformers.quantizers.auto:AutoQuantizationConfig.from_dict",
            _config_from_dict,
            ("quantization_config_dict",),
        ),
        Patch(
            "transformers.quantizers.auto:AutoHfQuantizer.merge_quantization_configs",
            _merge_configs,
            ("quantization_config", "quantization_config_from_args"),
        ),
        Patch("transformers.modeling_utils:_get_resolved_checkpoint_files", _resolve_files),
        Patch(f"{BASE}.preprocess_model", _before_loading, ("model", "kwargs")),
        Patch(f"{BASE}.postprocess_model", _after_loading, ("model",)),
    ),
)
