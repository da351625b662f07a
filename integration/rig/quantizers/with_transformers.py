"""transformers and its ``GPTQConfig``, with Optimum beneath."""

import torch


def quantize(source, calibration, flag, settings):
    from transformers import AutoModelForCausalLM, GPTQConfig

    config = GPTQConfig(dataset=calibration, bias_compensation=flag, **settings)
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    model.config.quantization_config.dataset = None  # tokens, which JSON cannot hold
    return model


def save(model, folder):
    model.save_pretrained(folder)


def load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def quantize_with_auto_gptq(source, calibration, flag, settings):
    from transformers import AutoModelForCausalLM, GPTQConfig

    dataset = [{key: value.tolist() for key, value in item.items()} for item in calibration]
    config = GPTQConfig(
        dataset=dataset, cache_block_outputs=False, bias_compensation=flag, **settings
    )
    return AutoModelForCausalLM.from_pretrained(
        source, quantization_config=config, device_map={"": "cpu"}, dtype=torch.float32
    )


def load_in_float32(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu"}, dtype=torch.float32)
