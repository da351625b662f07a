"""GPTQModel's own pipeline, for GPTQ and for AWQ."""


def quantize(source, calibration, flag, settings):
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    config = QuantizeConfig(bias_compensation=flag, device="cpu", **settings)
    qmodel = GPTQModel.load(source, config)
    # Its packer for AWQ wants a GPU, unless told to take the one in PyTorch.
    backend = BACKEND.AWQ_TORCH if settings.get("method") == "awq" else BACKEND.AUTO
    qmodel.quantize(calibration, backend=backend)
    return qmodel


def save(qmodel, folder):
    qmodel.save(str(folder))


def load(folder):
    from gptqmodel import GPTQModel

    return GPTQModel.load(str(folder), device="cpu").model
