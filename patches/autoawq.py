"""AutoAWQ: ``quantize(quant_config={..., "bias_compensation": ...})``, ``from_quantized``."""

from __future__ import annotations

import inspect
import warnings

from bc_plugin.errors import BiasCompensationError
from bc_plugin.names import KEY
from bc_plugin.supported import SUPPORTED
from bc_plugin.toolkits.awq import scales_are_applied
from bc_plugin.toolkits.flag import asked, config_of, is_entry, set_flag
from bc_plugin.toolkits.load import attach_held, hold_for
from bc_plugin.toolkits.patch import Patch, Toolkit, argument
from bc_plugin.toolkits.run import calibration_is_ready, run_compensated
from bc_plugin.toolkits.save import saved_whole

# Config


def _config_from_dict(wrapped, cls, args, kwargs):
    settings = dict(argument("quant_config", 0, args, kwargs))
    flag = settings.pop(KEY, None)
    config = wrapped(settings)
    set_flag(config, flag)
    return config


def _config_to_transformers(wrapped, config, args, kwargs):
    settings = wrapped(*args, **kwargs)
    if is_entry(getattr(config, KEY, None)):
        settings[KEY] = getattr(config, KEY)
    return settings


# Quantizing


def _quantize(wrapped, awq, args, kwargs):
    given = inspect.signature(wrapped).bind(*args, **kwargs).arguments
    config = asked(given.get("quant_config", {}).get(KEY))
    if config is None:
        return wrapped(*args, **kwargs)
    if given.get("export_compatible"):
        raise BiasCompensationError(
            "export_compatible=True leaves the weights unquantized, so there is nothing to "
            "compensate; quantize without it, or without bias_compensation."
        )
    from awq.models import base

    if base.get_best_device() == "cpu":
        # Its search restores weights from ``.cpu()``, which is no copy there.
        raise BiasCompensationError(
            "AutoAWQ 0.2.9 quantizes wrongly on a CPU: it goes on with weights that its search for "
            "scales has changed, which no bias repairs. Use a GPU, or GPTQModel's AWQ."
        )
    result = run_compensated(
        lambda: wrapped(*args, **kwargs),
        awq.model,
        config,
        lambda _: awq.model,
        lambda _, block: _as_quantized(block, awq.quant_config),
    )
    awq.quant_config = config_of(awq.model, awq.quant_config)
    return result


def _as_quantized(block, settings):
    from awq.modules import linear as kernels
    from awq.utils.module import exclude_layers_to_not_quantize, get_named_linears, set_op_by_name

    kernel = {
        "gemm": kernels.WQLinear_GEMM,
        "gemv": kernels.WQLinear_GEMV,
        "gemv_fast": kernels.WQLinear_GEMVFast,
        "marlin": kernels.WQLinear_Marlin,
    }[settings.version]
    linears = get_named_linears(block)
    chosen = exclude_layers_to_not_quantize(linears, settings.modules_to_not_convert)
    for path, linear in chosen.items():
        set_op_by_name(
            block,
            path,
            kernel.from_linear(linear, settings.w_bit, settings.q_group_size, init_only=True),
        )
    return block


# Saving


def _save_quantized(wrapped, awq, args, kwargs):
    awq.quant_config = config_of(awq.model, awq.quant_config)
    with saved_whole(awq.model, argument("save_dir", 0, args, kwargs)):
        return wrapped(*args, **kwargs)


# Loading


def _from_quantized(wrapped, cls, args, kwargs):
    from transformers import AutoConfig

    given = inspect.signature(wrapped).bind(*args, **kwargs)
    trusted = given.arguments.get("trust_remote_code", True)
    config = AutoConfig.from_pretrained(given.arguments["model_path"], trust_remote_code=trusted)
    entry = (getattr(config, "quantization_config", None) or {}).get(KEY)
    if entry is None:
        return wrapped(*args, **kwargs)
    if given.arguments.get("fuse_layers", True):
        warnings.warn(
            "AutoAWQ's fused layers cannot carry bias compensation, so this model is loaded "
            "without them; pass fuse_layers=False to load it without this warning.",
            stacklevel=2,
        )
        given.arguments["fuse_layers"] = False
    awq = wrapped(*given.args, **given.kwargs)
    if not attach_held(awq.model):
        raise BiasCompensationError(
            f"{given.arguments['model_path']} is compensated, but AutoAWQ loaded its weights in a "
            "way of its own; load it with transformers or GPTQModel."
        )
    set_flag(awq.quant_config, entry)
    return awq


def _load_checkpoint(wrapped, instance, args, kwargs):
    model = wrapped(*args, **kwargs)
    hold_for(model, argument("checkpoint", 1, args, kwargs))
    return model


# Toolkit

CONFIG = "awq.models._config:AwqConfig"
BASE = "awq.models.base"
MODEL = f"{BASE}:BaseAWQForCausalLM"
QUANTIZER = "awq.quantize.quantizer"
AUTOAWQ = Toolkit(
    name="autoawq",
    supported=SUPPORTED["autoawq"],
    config=(
        Patch(f"{CONFIG}.from_dict", _config_from_dict, ("quant_config",)),
        Patch(f"{CONFIG}.to_transformers_dict", _config_to_transformers),
    ),
    quantizing=(
        Patch(f"{MODEL}.quantize", _quantize, ("quant_config", "export_compatible")),
        Patch(f"{QUANTIZER}:get_calib_dataset", calibration_is_ready, ("data",)),
        Patch(f"{QUANTIZER}:apply_scale", scales_are_applied, ("module", "scales_list")),
    ),
    saving=(Patch(f"{MODEL}.save_quantized", _save_quantized, ("save_dir",)),),
    loading=(
        Patch(f"{MODEL}.from_quantized", _from_quantized, ("model_path", "fuse_layers")),
        Patch(f"{BASE}:load_checkpoint_and_dispatch", _load_checkpoint, ("model", "checkpoint")),
    ),
)
