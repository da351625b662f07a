"""GPTQModel's own pipeline, for GPTQ and for AWQ."""


def quantize(source, calibration, flag, settings):
    """``dtype`` among the settings is what the float model is read in; by default bfloat16."""
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    settings = dict(settings)
    dtype = settings.pop("dtype", "auto")
    config = QuantizeConfig(bias_compensation=flag, device="cpu", **settings)
    qmodel = GPTQModel.load(source, config, dtype=dtype)
    # Its packer for AWQ wants a GPU, unless told to take the one in PyTorch.
    backend = BACKEND.AWQ_TORCH if settings.get("method") == "awq" else BACKEND.AUTO
    qmodel.quantize(calibration, backend=backend)
    return qmodel


def save(qmodel, folder):
    qmodel.save(str(folder))


def load(folder):
    from gptqmodel import GPTQModel

    return GPTQModel.load(str(folder), device="cpu").model
