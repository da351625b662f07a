"""GPTQModel: ``QuantizeConfig(bias_compensation=...)``, ``quantize``, ``save``, ``load``.

Optimum quantizes with its GPTQ object, too.
"""

from __future__ import annotations

from types import SimpleNamespace

from bc_plugin.config import BiasCompensationConfig
from bc_plugin.errors import BiasCompensationError
from bc_plugin.marks import mark, mark_of, unmark
from bc_plugin.models.modules import copy_of, linears_of
from bc_plugin.names import KEY
from bc_plugin.supported import SUPPORTED
from bc_plugin.toolkits.awq import scales_are_applied
from bc_plugin.toolkits.flag import asked_by, config_of, config_to_dict, is_entry, set_flag
from bc_plugin.toolkits.gptq import (
    batch_is_added,
    hessian_is_adopted,
    hessian_is_finished,
    linear_is_quantized,
)
from bc_plugin.toolkits.load import attach_held, hold_for, look_at, reading_weights
from bc_plugin.toolkits.patch import Patch, Toolkit, argument
from bc_plugin.toolkits.run import calibration_is_ready, run_compensated
from bc_plugin.toolkits.save import plain_vectors, put_vectors, saved_whole, take_vectors
from bc_plugin.vectors import Compensation
from bc_plugin.vectors.joint import saved_without
from bc_plugin.vectors.sealed import unseal
from bc_plugin.vectors.settings import read_settings

# Config


def _make_config(wrapped, cls, args, kwargs):
    flag = kwargs.pop(KEY, None)
    # The pass needs the float weights, and the quantized ones, in one process.
    if not is_entry(flag) and BiasCompensationConfig.parse(flag) is not None:
        kwargs.setdefault("offload_to_disk", False)
    config = wrapped(*args, **kwargs)
    set_flag(config, flag)
    return config


def _config_from_dict(wrapped, cls, args, kwargs):
    settings = unseal(argument("quantize_cfg", 0, args, kwargs))
    others = {name: value for name, value in kwargs.items() if name != "quantize_cfg"}
    return wrapped(settings, *args[1:], **others)


# Quantizing


def _quantize(wrapped, qmodel, args, kwargs):
    settings = qmodel.quantize_config
    config = asked_by(settings, kwargs)
    if config is not None:
        _check_settings(settings)
    result = run_compensated(
        lambda: wrapped(*args, **kwargs),
        qmodel.model,
        config,
        lambda _: qmodel.model,
        lambda name, block: _ready_to_run(_with_kernels(name, block, qmodel), qmodel),
        lambda block: _ready_to_run(copy_of(block), qmodel),
    )
    qmodel.quantize_config = config_of(qmodel.model, qmodel.quantize_config)
    return result


def _check_settings(settings):
    if settings.method not in ("gptq", "awq"):
        raise BiasCompensationError(
            f"bias_compensation was asked for, but GPTQModel's method {settings.method} cannot "
            "honour it; quantize with GPTQ or AWQ, or compensate the loaded result with "
            "bc_plugin.compensate."
        )
    if settings.offload_to_disk:
        raise BiasCompensationError(
            "bias_compensation needs the float weights in memory; pass offload_to_disk=False to "
            "QuantizeConfig (the default where bias_compensation is given to it)."
        )


def _with_kernels(name, block, qmodel):
    from gptqmodel.utils.model import create_quant_module

    settings, block = qmodel.quantize_config, block.to("cpu")
    awq = settings.method == "awq"
    groups = qmodel.simple_layer_modules(qmodel.model.config, settings, is_awq_quantize=awq)
    model = _at(name, block)  # rules for single modules are about their full names
    for path, linear in linears_of(block):
        if any(path in group for group in groups):
            create_quant_module(
                name=f"{name}.{path}",
                linear_cls=qmodel.qlinear_kernel,
                bits=settings.runtime_bits,
                desc_act=settings.desc_act,
                dynamic=settings.dynamic,
                group_size=settings.group_size,
                module=model,
                submodule=linear,
                sym=settings.sym,
                device=settings.device,
                lm_head_name=qmodel.lm_head,
                pack_dtype=settings.pack_dtype,
                format=settings.format,
            )
    return block


def _at(name, block):
    for part in reversed(name.split(".")):
        block = SimpleNamespace(**{part: block})
    return block


def _ready_to_run(block, qmodel):
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format

    settings = qmodel.quantize_config
    if settings.format == "gptq":
        # As its loader does. Until then the kernels of the model in memory misread zero points.
        convert_gptq_v1_to_v2_format(block, settings, qmodel.qlinear_kernel)
    return block.to(settings.device.type)


# Saving


def _save_quantized(wrapped, qmodel, args, kwargs):
    model = qmodel.model
    qmodel.quantize_config = config_of(model, qmodel.quantize_config)
    folder = argument("save_dir", 0, args, kwargs)
    with saved_whole(model, folder, from_memory=not qmodel.load_quantized_model):
        with plain_vectors(model) as compensation:
            if compensation is not None:
                mark(qmodel, compensation)
            try:
                result = wrapped(*args, **kwargs)
            finally:
                unmark(qmodel, Compensation)
        if compensation is not None and qmodel.model is not model:  # it has loaded itself anew
            take_vectors(compensation, qmodel.model)
            compensation.attach_unchecked(qmodel.model)
    return result


def _model_to_save(wrapped, qmodel, args, kwargs):
    # The weights of its folder once more, with the vectors that are attached by now.
    model = wrapped(*args, **kwargs)
    unmark(model, Compensation)
    compensation = mark_of(qmodel, Compensation)
    if compensation is not None:
        put_vectors(compensation, model)
    return model


# Loading


def _from_quantized(wrapped, cls, args, kwargs):
    qmodel = wrapped(*args, **kwargs)
    entry = read_settings(qmodel.model_local_path).get(KEY)
    if entry is None:
        return qmodel
    if Compensation.attached_to(qmodel.model) is None and not saved_without(entry):
        raise BiasCompensationError(
            f"{qmodel.model_local_path} is compensated, but this backend of GPTQModel loads "
            "weights in a way of its own; choose another backend, or load with transformers."
        )
    set_flag(qmodel.quantize_config, entry)
    return qmodel


def _get_checkpoints(wrapped, instance, args, kwargs):
    with reading_weights(argument("model_id_or_path", 0, args, kwargs)):
        sharded, file, basename = wrapped(*args, **kwargs)
    look_at(file)
    return sharded, file, basename


def _load_checkpoint(wrapped, instance, args, kwargs):
    result = wrapped(*args, **kwargs)
    hold_for(argument("model", 0, args, kwargs), argument("checkpoint", 1, args, kwargs))
    return result


def _post_init(wrapped, instance, args, kwargs):
    model = wrapped(*args, **kwargs)
    attach_held(model)
    return model


# Toolkit

CONFIG = "gptqmodel.quantization.config"
GPTQ = "gptqmodel.quantization.gptq:GPTQ"
MODEL = "gptqmodel.models.base:BaseQModel"
AWQ = "gptqmodel.looper.awq_processor"
LOADER = "gptqmodel.models.loader"
GPTQMODEL = Toolkit(
    name="gptqmodel",
    supported=SUPPORTED["gptqmodel"],
    config=(
        Patch(f"{CONFIG}:QuantizeConfigMeta.__call__", _make_config, ("kwargs",)),
        Patch(f"{CONFIG}:BaseQuantizeConfig.to_dict", config_to_dict),
        Patch(
            f"{CONFIG}:BaseQuantizeConfig.from_quant_config", _config_from_dict, ("quantize_cfg",)
        ),
    ),
    quantizing=(
        Patch(f"{MODEL}.quantize", _quantize, ("calibration",)),
        Patch(f"{MODEL}.prepare_dataset", calibration_is_ready, ("calibration_dataset",)),
        Patch(f"{GPTQ}.add_batch", batch_is_added, ("inp", "out")),
        Patch(f"{GPTQ}.adopt_hessian_from", hessian_is_adopted, ("leader",)),
        Patch(f"{GPTQ}.finalize_hessian", hessian_is_finished),
        Patch(f"{GPTQ}.quantize", linear_is_quantized),
        Patch(f"{AWQ}:apply_scale", scales_are_applied, ("module", "scales_list")),
    ),
    saving=(
        Patch(f"{MODEL}.save_quantized", _save_quantized, ("save_dir",)),
        Patch(f"{MODEL}.get_model_with_quantize", _model_to_save, ("model_id_or_path",)),
    ),
    loading=(
        Patch(f"{MODEL}.from_quantized", _from_quantized, ("model_id_or_path",)),
        Patch(f"{LOADER}:get_checkpoints", _get_checkpoints, ("model_id_or_path",)),
        Patch(
            f"{LOADER}:load_checkpoint_in_model_then_tie_weights",
            _load_checkpoint,
            ("model", "kwargs"),
        ),
        Patch(f"{LOADER}:gptqmodel_post_init", _post_init, ("model",)),
    ),
)
