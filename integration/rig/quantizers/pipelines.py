"""Every toolkit behind the same four functions, for the tests and benchmarks that treat them alike.

Calibration data is a list of ``{"input_ids", "attention_mask"}`` with one sequence each.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rig.cpu_shims import auto_gptq_on_cpu, autoawq_on_cpu, optimum_with_auto_gptq_on_cpu

CPU = {"": "cpu"}


@dataclass(frozen=True)
class Toolkit:
    """One way to quantize.

    Attributes:
        name: The toolkit's own name, and the method's where it has several.
        needs: Modules that have to be installed.
        lacks: A module whose presence would have another backend chosen.
        quantize: (source, calibration, flag, settings) -> whatever the toolkit returns.
        save: (what was returned, folder) -> None.
        load: (folder) -> the model.
        shims: What it needs to run on a CPU.
        exact: Whether the model in memory computes what it will compute once loaded again.
        settings: What ``quantize`` passes on, apart from the flag.
        dtype: The type that float models are read in.
    """

    name: str
    needs: tuple[str, ...]
    quantize: Callable[[str, list, Any, dict[str, Any]], Any]
    save: Callable[[Any, Path], None]
    load: Callable[[Path], nn.Module]
    lacks: str = ""
    shims: tuple[Callable[[], Any], ...] = ()
    exact: bool = True
    settings: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32

    @property
    def installed(self) -> bool:
        """Whether this environment has it."""
        found = {name: importlib.util.find_spec(name) for name in (*self.needs, self.lacks) if name}
        return all(found[name] for name in self.needs) and not found.get(self.lacks)

    @contextmanager
    def on_cpu(self) -> Iterator[None]:
        """While this lasts it runs without a GPU."""
        with ExitStack() as stack:
            for shim in self.shims:
                stack.enter_context(shim())
            yield


def model_of(result: Any) -> nn.Module:
    """The transformers model in whatever a toolkit returns."""
    config = getattr(result, "config", None)
    return result if hasattr(config, "quantization_config") else result.model


# transformers, with Optimum beneath


def _transformers_quantize(source, calibration, flag, settings):
    from transformers import AutoModelForCausalLM, GPTQConfig

    config = GPTQConfig(dataset=calibration, bias_compensation=flag, **settings)
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    model.config.quantization_config.dataset = None  # tokens, which JSON cannot hold
    return model


def _transformers_save(model, folder):
    model.save_pretrained(folder)


def _transformers_load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def _legacy_quantize(source, calibration, flag, settings):
    from transformers import AutoModelForCausalLM, GPTQConfig

    dataset = [{key: value.tolist() for key, value in item.items()} for item in calibration]
    config = GPTQConfig(
        dataset=dataset, cache_block_outputs=False, bias_compensation=flag, **settings
    )
    return AutoModelForCausalLM.from_pretrained(
        source, quantization_config=config, device_map=CPU, dtype=torch.float32
    )


def _legacy_load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, device_map=CPU, dtype=torch.float32)


# Optimum's own quantizer


def _optimum_quantize(source, calibration, flag, settings):
    from optimum.gptq import GPTQQuantizer
    from transformers import AutoModelForCausalLM

    quantizer = GPTQQuantizer(dataset=calibration, bias_compensation=flag, **settings)
    model = quantizer.quantize_model(AutoModelForCausalLM.from_pretrained(source))
    quantizer.dataset = model.config.quantization_config["dataset"] = None
    model.quantizer = quantizer
    return model


def _optimum_save(model, folder):
    model.quantizer.save(model, folder)


# AutoGPTQ


def _auto_gptq_quantize(source, calibration, flag, settings):
    from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig

    config = BaseQuantizeConfig(desc_act=False, bias_compensation=flag, **settings)
    gptq = AutoGPTQForCausalLM.from_pretrained(source, config, torch_dtype=torch.float32)
    gptq.quantize(calibration)
    return gptq


def _auto_gptq_save(gptq, folder):
    gptq.save_quantized(str(folder), use_safetensors=True)


def _auto_gptq_load(folder):
    from auto_gptq import AutoGPTQForCausalLM

    return AutoGPTQForCausalLM.from_quantized(
        str(folder), device="cpu", torch_dtype=torch.float32
    ).model


# GPTQModel


def _gptqmodel_quantize(source, calibration, flag, settings):
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    config = QuantizeConfig(bias_compensation=flag, device="cpu", **settings)
    qmodel = GPTQModel.load(source, config)
    # Its packer for AWQ wants a GPU, unless told to take the one in PyTorch.
    backend = BACKEND.AWQ_TORCH if settings.get("method") == "awq" else BACKEND.AUTO
    qmodel.quantize(calibration, backend=backend)
    return qmodel


def _gptqmodel_save(qmodel, folder):
    qmodel.save(str(folder))


def _gptqmodel_load(folder):
    from gptqmodel import GPTQModel

    return GPTQModel.load(str(folder), device="cpu").model


# AutoAWQ


def _autoawq_quantize(source, calibration, flag, settings):
    from awq import AutoAWQForCausalLM
    from transformers import AutoTokenizer

    # Half precision is many times slower on a CPU; it stores its weights in float16 all the same.
    awq = AutoAWQForCausalLM.from_pretrained(source, torch_dtype=torch.float32)
    sequences = [item["input_ids"][0].tolist() for item in calibration]
    config = {"w_bit": settings["bits"], "q_group_size": settings["group_size"], "version": "GEMM"}
    awq.quantize(
        AutoTokenizer.from_pretrained(source),
        quant_config={**config, "bias_compensation": flag},
        calib_data=sequences,
        max_calib_seq_len=len(sequences[0]),
    )
    return awq


def _autoawq_save(awq, folder):
    awq.save_quantized(str(folder))


def _autoawq_load(folder):
    from awq import AutoAWQForCausalLM

    return AutoAWQForCausalLM.from_quantized(str(folder), device_map=CPU, fuse_layers=False).model


# Plain GPTQ as in its paper: asymmetric, columns in their natural order, one percent of damping.
_AS_PUBLISHED = {"sym": False, "act_group_aware": False, "damp_percent": 0.01}

PIPELINES = {
    toolkit.name: toolkit
    for toolkit in (
        Toolkit(
            "transformers",
            ("optimum", "gptqmodel"),
            _transformers_quantize,
            _transformers_save,
            _transformers_load,
            settings=_AS_PUBLISHED,
        ),
        Toolkit(
            "optimum",
            ("optimum", "gptqmodel"),
            _optimum_quantize,
            _optimum_save,
            _transformers_load,
            settings=_AS_PUBLISHED,
        ),
        Toolkit(
            "gptqmodel",
            ("gptqmodel",),
            _gptqmodel_quantize,
            _gptqmodel_save,
            _gptqmodel_load,
            exact=False,  # its kernels misread zero points until the loader has converted them
            settings=_AS_PUBLISHED,
        ),
        Toolkit(
            "gptqmodel-awq",
            ("gptqmodel",),
            _gptqmodel_quantize,
            _gptqmodel_save,
            _gptqmodel_load,
            exact=False,  # another kernel in memory than after loading
            settings={"method": "awq", "format": "gemm", "sym": False},
            dtype=torch.bfloat16,
        ),
        Toolkit(
            "autoawq",
            ("awq",),
            _autoawq_quantize,
            _autoawq_save,
            _autoawq_load,
            shims=(autoawq_on_cpu,),
            exact=False,  # in half precision once loaded
        ),
        Toolkit(
            "auto_gptq",
            ("auto_gptq",),
            _auto_gptq_quantize,
            _auto_gptq_save,
            _auto_gptq_load,
            shims=(auto_gptq_on_cpu,),
            settings={"sym": False},
        ),
        Toolkit(
            "transformers-auto_gptq",
            ("optimum", "auto_gptq"),
            _legacy_quantize,
            _transformers_save,
            _legacy_load,
            lacks="gptqmodel",
            shims=(auto_gptq_on_cpu, optimum_with_auto_gptq_on_cpu),
        ),
    )
}
