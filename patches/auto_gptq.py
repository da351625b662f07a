"""AutoGPTQ: ``BaseQuantizeConfig(bias_compensation=...)``, ``quantize``, ``from_quantized``."""

from __future__ import annotations

import inspect
import json
from dataclasses import fields
from itertools import chain
from pathlib import Path

from bc_plugin.errors import BiasCompensationError
from bc_plugin.names import KEY
from bc_plugin.supported import SUPPORTED
from bc_plugin.toolkits.flag import asked_by, config_of, config_to_dict, set_flag
from bc_plugin.toolkits.joint import centred_inputs, weight_of
from bc_plugin.toolkits.load import attach_around, files_read, read_compensation
from bc_plugin.toolkits.patch import Patch, Toolkit, argument
from bc_plugin.toolkits.run import calibration_is_ready, is_running, run_compensated
from bc_plugin.toolkits.save import saved_whole
from bc_plugin.vectors.joint import note_saved_without
from bc_plugin.vectors.settings import read_settings

# Config


def _config_init(wrapped, config, args, kwargs):
    flag = kwargs.pop(KEY, None)
    wrapped(*args, **kwargs)
    set_flag(config, flag)


def _config_from_pretrained(wrapped, cls, args, kwargs):
    settings = read_settings(_folder_of(argument("save_dir", 0, args, kwargs), kwargs))
    if KEY not in settings:
        return wrapped(*args, **kwargs)
    # AutoGPTQ looks for its own file only, which transformers does not write.
    known = {field.name for field in fields(cls)} | {KEY}
    return cls(**{name: value for name, value in settings.items() if name in known})


def _folder_of(checkpoint, kwargs):
    """Where the config of a checkpoint is, which may be a name on the hub."""
    if Path(checkpoint).is_dir():
        return checkpoint
    from transformers.utils.hub import cached_file

    given = {name: kwargs[name] for name in HUB if name in kwargs}
    return Path(cached_file(checkpoint, "config.json", **given)).parent


# Quantizing


def _quantize(wrapped, gptq, args, kwargs):
    config = asked_by(gptq.quantize_config, kwargs)
    given = inspect.signature(wrapped).bind(*args, **kwargs).arguments
    kernel = {name: given[name] for name in ("use_triton", "use_cuda_fp16") if name in given}
    result = run_compensated(
        lambda: wrapped(*args, **kwargs),
        gptq.model,
        config,
        lambda _: gptq.model,
        lambda _, block: _as_quantized(block, gptq, kernel),
    )
    gptq.quantize_config = config_of(gptq.model, gptq.quantize_config)
    return result


def _as_quantized(block, gptq, kernel):
    from auto_gptq.modeling._utils import make_quant

    settings = gptq.quantize_config
    make_quant(
        block,
        list(chain.from_iterable(gptq.inside_layer_modules)),
        settings.bits,
        settings.group_size,
        desc_act=settings.desc_act,
        disable_exllama=False,
        disable_exllamav2=True,
        **kernel,
    )
    return block


def _add_batch(wrapped, gptq, args, kwargs):
    inputs = centred_inputs(gptq.layer)
    if inputs is None:
        return wrapped(*args, **kwargs)
    return wrapped(
        inputs.centre(argument("inp", 0, args, kwargs)), argument("out", 1, args, kwargs)
    )


def _fasterquant(wrapped, gptq, args, kwargs):
    inputs = centred_inputs(gptq.layer)
    if inputs is None:
        return wrapped(*args, **kwargs)
    weight = weight_of(gptq.layer)
    inputs.finish(gptq.H, gptq.nsamples)
    scales, zeros, groups = wrapped(*args, **kwargs)
    limits = -zeros, int(gptq.quantizer.maxq) - zeros
    rounded = weight_of(gptq.layer)
    rounded, scales = inputs.improve(gptq.layer, weight, rounded, scales, groups, *limits)
    gptq.layer.weight.data = rounded
    inputs.follow(gptq.layer, weight, rounded)
    return scales, zeros, groups


def _find_params(wrapped, quantizer, args, kwargs):
    wrapped(*args, **kwargs)
    if is_running() and not quantizer.sym:
        # Zero points are packed less one. -1 overwrites its neighbours too, and at 3 bits AutoGPTQ
        # reads it as 8 and other kernels as 0: no vector would be right for both.
        wraps = quantizer.zero == 0
        quantizer.zero[wraps] = 1
        quantizer.scale[wraps] *= quantizer.maxq / (quantizer.maxq - 1)


# Saving


def _save_quantized(wrapped, gptq, args, kwargs):
    gptq.quantize_config = config_of(gptq.model, gptq.quantize_config)
    with saved_whole(gptq.model, argument("save_dir", 0, args, kwargs)):
        return wrapped(*args, **kwargs)


# Loading


def _from_quantized(wrapped, cls, args, kwargs):
    token = files_read.set(None)
    try:
        gptq = wrapped(*args, **kwargs)
    finally:
        files_read.reset(token)
    # Saving it again writes what its own config says.
    gptq.quantize_config = config_of(gptq.model, gptq.quantize_config)
    return gptq


def _get_checkpoints(wrapped, instance, args, kwargs):
    sharded, file, basename = wrapped(*args, **kwargs)
    files = [Path(file)]
    if sharded:
        names = json.loads(files[0].read_text())["weight_map"].values()
        files = [files[0].parent / name for name in sorted(set(names))]
    files_read.set(tuple(files))
    return sharded, file, basename


def _post_init(wrapped, instance, args, kwargs):
    files = files_read.get()
    settings = read_settings(files[0].parent) if files else {}
    compensation = read_compensation(settings.get(KEY), files or ())
    if compensation and "gptq_v2" in (settings.get("format"), settings.get("checkpoint_format")):
        raise BiasCompensationError(
            f"{files[0].parent} is in the format gptq_v2, whose zero points AutoGPTQ misreads; "
            "load it with transformers and gptqmodel, or quantize with AutoGPTQ."
        )
    model = argument("model", 0, args, kwargs)
    note_saved_without(settings.get(KEY), model)
    return attach_around(lambda: wrapped(*args, **kwargs), model, compensation)


# Toolkit

HUB = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "use_auth_token")
BASE = "auto_gptq.modeling._base"
MODEL = f"{BASE}:BaseGPTQForCausalLM"
CONFIG = f"{BASE}:BaseQuantizeConfig"
GPTQ = "auto_gptq.quantization.gptq:GPTQ"
QUANTIZER = "auto_gptq.quantization.quantizer:Quantizer"
AUTO_GPTQ = Toolkit(
    name="auto_gptq",
    supported=SUPPORTED["auto_gptq"],
    config=(
        Patch(f"{CONFIG}.__init__", _config_init, ("bits", "group_size")),
        Patch(f"{CONFIG}.from_pretrained", _config_from_pretrained, ("save_dir",)),
        Patch(f"{CONFIG}.to_dict", config_to_dict),
    ),
    quantizing=(
        Patch(f"{MODEL}.quantize", _quantize, ("examples", "batch_size")),
        Patch(f"{MODEL}._prepare_examples_for_quantization", calibration_is_ready, ("examples",)),
        Patch(f"{GPTQ}.add_batch", _add_batch, ("inp", "out")),
        Patch(f"{GPTQ}.fasterquant", _fasterquant),
        Patch(f"{QUANTIZER}.find_params", _find_params),
    ),
    saving=(Patch(f"{MODEL}.save_quantized", _save_quantized, ("save_dir",)),),
    loading=(
        Patch(f"{MODEL}.from_quantized", _from_quantized, ("model_name_or_path",)),
        Patch(f"{BASE}:get_checkpoints", _get_checkpoints, ("model_name_or_path",)),
        Patch(f"{BASE}:autogptq_post_init", _post_init, ("model",)),
    ),
)
