"""AutoGPTQ's own pipeline."""

import torch


def quantize(source, calibration, flag, settings):
    from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig

    config = BaseQuantizeConfig(desc_act=False, bias_compensation=flag, **settings)
    gptq = AutoGPTQForCausalLM.from_pretrained(source, config, torch_dtype=torch.float32)
    gptq.quantize(calibration)
    return gptq


def save(gptq, folder):
    gptq.save_quantized(str(folder), use_safetensors=True)


def load(folder):
    from auto_gptq import AutoGPTQForCausalLM

    return AutoGPTQForCausalLM.from_quantized(
        str(folder), device="cpu", torch_dtype=torch.float32
    ).model
