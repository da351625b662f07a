"""Whoever asks for compensation gets it, from one config object however often, or an error."""

import inspect
import json

import pytest
import torch
import transformers.utils.quantization_config as configs
from rig.quantizers.pipelines import PIPELINES, model_of
from rig.subjects.tiny import sequences, tiny_checkpoint, tiny_tokenizer
from transformers import AutoModelForCausalLM, GPTQConfig

from bc_plugin import BiasCompensationConfig, BiasCompensationError, Compensation

FLAG = {"positions": 0, "held_out": 0.25}
SETTINGS = {"bits": 4, "group_size": 32}


def _transformers(flag):
    config = GPTQConfig(**SETTINGS, dataset=sequences(), bias_compensation=flag)
    return config, lambda source: _without_dataset(
        AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    )


def _without_dataset(model):
    model.config.quantization_config.dataset = None  # tokens, which JSON cannot hold
    return model


def _legacy(flag):
    dataset = [{key: value.tolist() for key, value in item.items()} for item in sequences()]
    config = GPTQConfig(
        **SETTINGS, dataset=dataset, cache_block_outputs=False, bias_compensation=flag
    )
    return config, lambda source: AutoModelForCausalLM.from_pretrained(
        source, quantization_config=config, device_map={"": "cpu"}, dtype=torch.float32
    )


def _optimum(flag):
    from optimum.gptq import GPTQQuantizer

    quantizer = GPTQQuantizer(**SETTINGS, dataset=sequences(), bias_compensation=flag)

    def quantize(source):
        quantizer.dataset = sequences()
        model = quantizer.quantize_model(AutoModelForCausalLM.from_pretrained(source))
        quantizer.dataset = model.config.quantization_config["dataset"] = None
        model.quantizer = quantizer
        return model

    return quantizer, quantize


def _gptqmodel(flag):
    from gptqmodel import GPTQModel, QuantizeConfig

    config = QuantizeConfig(**SETTINGS, device="cpu", bias_compensation=flag)

    def quantize(source, **option):
        qmodel = GPTQModel.load(source, config)
        qmodel.quantize(sequences(), **option)
        return qmodel

    return config, quantize


def _auto_gptq(flag):
    from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig

    config = BaseQuantizeConfig(**SETTINGS, desc_act=False, bias_compensation=flag)

    def quantize(source, **option):
        gptq = AutoGPTQForCausalLM.from_pretrained(source, config, torch_dtype=torch.float32)
        gptq.quantize(sequences(), **option)
        return gptq

    return config, quantize


def _autoawq(flag):
    config = {"w_bit": 4, "q_group_size": 32, "version": "GEMM", "bias_compensation": flag}

    def quantize(source):
        from awq import AutoAWQForCausalLM
        from transformers import AutoTokenizer

        awq = AutoAWQForCausalLM.from_pretrained(source, torch_dtype=torch.float32)
        data = [item["input_ids"][0].tolist() for item in sequences()]
        tokenizer = AutoTokenizer.from_pretrained(source)
        awq.quantize(tokenizer, quant_config=config, calib_data=data, max_calib_seq_len=24)
        return awq

    return config, quantize


MAKERS = {
    "transformers": _transformers,
    "transformers-auto_gptq": _legacy,
    "optimum": _optimum,
    "gptqmodel": _gptqmodel,
    "auto_gptq": _auto_gptq,
    "autoawq": _autoawq,
}


@pytest.fixture(scope="module", params=MAKERS)
def toolkit(request):
    found = PIPELINES[request.param]
    if not found.installed:
        pytest.skip(f"{found.name} is not in this environment")
    with found.on_cpu():
        yield found


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Two float models."""
    folders = [tiny_checkpoint(tmp_path_factory.mktemp("float"), seed=seed) for seed in (0, 1)]
    for folder in folders:
        tiny_tokenizer().save_pretrained(folder)
    return folders


def _entries(folder):
    for path in folder.glob("*config.json"):
        settings = json.loads(path.read_text())
        settings = settings.get("quantization_config", settings)
        if "bits" in settings:
            yield settings.get("bias_compensation")


def test_one_config_asks_for_every_model(toolkit, sources, tmp_path, enabled):
    """Both are saved after both were quantized: each has the entry of its own vectors."""
    config, quantize = MAKERS[toolkit.name](FLAG)
    results = [quantize(source) for source in sources]
    found = [Compensation.attached_to(model_of(result)) for result in results]
    assert None not in found
    assert found[0].digest != found[1].digest
    for result, compensation, folder in zip(results, found, "ab", strict=True):
        toolkit.save(result, tmp_path / folder)
        entries = list(_entries(tmp_path / folder))
        assert entries and all(entry["digest"] == compensation.digest for entry in entries)
        loaded = Compensation.attached_to(toolkit.load(tmp_path / folder))
        assert loaded.digest == compensation.digest
    still = (config if isinstance(config, dict) else vars(config))["bias_compensation"]
    assert BiasCompensationConfig.parse(still) == BiasCompensationConfig(**FLAG)


def test_quantizing_with_the_entry_of_another_model_is_refused(toolkit, sources, enabled):
    entry = {"format_version": 1, "digest": "0123456789abcdef"}
    _, quantize = MAKERS[toolkit.name](entry)
    with pytest.raises(BiasCompensationError, match=r"digest 01234567.* pass True, a dict"):
        quantize(sources[0])


def test_the_keyword_of_quantize_asks_for_one_model_only(toolkit, sources, tmp_path, enabled):
    _, quantize = MAKERS[toolkit.name](FLAG)
    if "option" not in inspect.signature(quantize).parameters:
        pytest.skip("its quantize does not take it")
    plain = quantize(sources[0], bias_compensation=False)
    assert Compensation.attached_to(model_of(plain)) is None
    toolkit.save(plain, tmp_path / "plain")
    assert set(_entries(tmp_path / "plain")) == {None}
    result = quantize(sources[1])
    assert Compensation.attached_to(model_of(result)).positions == 0


def _others():
    known = vars(configs).values()
    mixin = configs.QuantizationConfigMixin
    classes = [c for c in known if isinstance(c, type) and issubclass(c, mixin)]
    return sorted({c.__name__ for c in classes} - {"QuantizationConfigMixin", "GPTQConfig"})


@pytest.mark.parametrize("name", _others())
def test_a_config_that_nobody_compensates_with_says_so(enabled, name):
    with pytest.raises(BiasCompensationError, match=rf"{name} .*bc_plugin\.compensate\("):
        getattr(configs, name)(bias_compensation=True)


@pytest.mark.parametrize("flag", [None, False])
def test_other_configs_take_a_no(enabled, flag):
    config = configs.BitsAndBytesConfig(load_in_8bit=True, bias_compensation=flag)
    assert "bias_compensation" not in config.to_dict()
    assert configs.AwqConfig(bits=4).bits == 4


def test_a_request_in_a_dict_says_so_too(sources, enabled):
    settings = {"quant_method": "quanto", "weights": "int8", "bias_compensation": True}
    with pytest.raises(BiasCompensationError, match=r"QuantoConfig .*bc_plugin\.compensate\("):
        AutoModelForCausalLM.from_pretrained(sources[0], quantization_config=settings)
