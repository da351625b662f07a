"""Optimum's own quantizer; transformers loads what it saves."""


def quantize(source, calibration, flag, settings):
    from optimum.gptq import GPTQQuantizer
    from transformers import AutoModelForCausalLM

    quantizer = GPTQQuantizer(dataset=calibration, bias_compensation=flag, **settings)
    model = quantizer.quantize_model(AutoModelForCausalLM.from_pretrained(source))
    quantizer.dataset = model.config.quantization_config["dataset"] = None
    model.quantizer = quantizer
    return model


def save(model, folder):
    model.quantizer.save(model, folder)
