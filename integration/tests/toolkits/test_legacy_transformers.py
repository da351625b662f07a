"""transformers 4.57 and Optimum 2.0 on AutoGPTQ, and checkpoints that change hands."""

import json
import shutil

import pytest
import torch

pytest.importorskip("auto_gptq", reason="needs the autogptq extra, in its own environment")

from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig
from rig.cpu_shims import auto_gptq_on_cpu, optimum_with_auto_gptq_on_cpu
from rig.folders import CACHE
from rig.subjects.tiny import logits, sequences, tiny_checkpoint
from transformers import AutoModelForCausalLM, GPTQConfig

import bc_plugin
from bc_plugin import BiasCompensationError, Compensation
from bc_plugin.vectors.sealed import unseal
from bc_plugin.vectors.written import write_entry

FLAG = {"positions": 1, "held_out": 0.25}
CPU = {"": "cpu"}


@pytest.fixture(scope="module", autouse=True)
def _on_cpu():
    with auto_gptq_on_cpu(), optimum_with_auto_gptq_on_cpu():
        yield


@pytest.fixture
def enabled(_on_cpu):
    bc_plugin.enable()
    yield bc_plugin
    bc_plugin.disable()


def _by_transformers(source, dtype=torch.float32, bits=4, flag=FLAG):
    config = GPTQConfig(
        bits=bits,
        group_size=32,
        dataset=[{k: v.tolist() for k, v in s.items()} for s in sequences()],
        cache_block_outputs=False,
        bias_compensation=flag,
    )
    return AutoModelForCausalLM.from_pretrained(
        source, quantization_config=config, device_map=CPU, dtype=dtype
    )


def _by_auto_gptq(source, bits=4, dtype=torch.float32):
    config = BaseQuantizeConfig(bits=bits, group_size=32, desc_act=False, bias_compensation=FLAG)
    model = AutoGPTQForCausalLM.from_pretrained(source, config, torch_dtype=dtype)
    model.quantize(sequences())
    return model


def _close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_quantize_save_load(tmp_path, enabled, architecture):
    model = _by_transformers(tiny_checkpoint(tmp_path / "float", architecture))
    compensation = Compensation.attached_to(model)
    model.save_pretrained(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", device_map=CPU, dtype=torch.float32
    )
    assert Compensation.attached_to(loaded).digest == compensation.digest
    _close(logits(loaded), logits(model))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_checkpoint_of_auto_gptq_loads_in_transformers(tmp_path, enabled, bits):
    model = _by_auto_gptq(tiny_checkpoint(tmp_path / "float"), bits)
    model.save_quantized(tmp_path / "out", use_safetensors=True)
    # transformers looks for one name only.
    (file,) = (tmp_path / "out").glob("*.safetensors")
    file.rename(file.with_name("model.safetensors"))
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", device_map=CPU, dtype=torch.float32
    )
    assert Compensation.attached_to(loaded) is not None
    _close(logits(loaded), logits(model.model))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_checkpoint_of_transformers_loads_in_auto_gptq(tmp_path, enabled, bits):
    model = _by_transformers(tiny_checkpoint(tmp_path / "float"), bits=bits)
    model.save_pretrained(tmp_path / "out")
    loaded = AutoGPTQForCausalLM.from_quantized(
        str(tmp_path / "out"), device="cpu", torch_dtype=torch.float32
    )
    _close(logits(loaded.model), logits(model))


def test_a_format_that_auto_gptq_misreads_is_refused(tmp_path, enabled):
    _by_transformers(tiny_checkpoint(tmp_path / "float")).save_pretrained(tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    settings = unseal(config["quantization_config"])
    config["quantization_config"] = {**settings, "checkpoint_format": "gptq_v2"}
    path.write_text(json.dumps(config))
    write_entry(tmp_path / "out", settings["bias_compensation"])  # as if it was saved so
    with pytest.raises(BiasCompensationError, match="gptq_v2"):
        AutoGPTQForCausalLM.from_quantized(str(tmp_path / "out"), device="cpu")


@pytest.mark.parametrize("bits", [3, 4])
def test_checkpoints_are_left_for_the_other_environment(tmp_path, enabled, bits):
    folder = CACHE / "exchange" / f"auto_gptq-{bits}bit"
    shutil.rmtree(folder, ignore_errors=True)
    model = _by_auto_gptq(tiny_checkpoint(tmp_path / "float"), bits)
    model.save_quantized(folder, use_safetensors=True)
    (file,) = folder.glob("*.safetensors")
    file.rename(file.with_name("model.safetensors"))
    torch.save(logits(model.model), folder / "logits.pt")
