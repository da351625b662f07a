"""AutoGPTQ 0.7.1, in its own environment (``make test`` builds it)."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("auto_gptq", reason="needs the autogptq extra, in its own environment")

from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig
from auto_gptq.quantization.gptq import GPTQ
from rig.cpu_shims import auto_gptq_on_cpu
from rig.subjects.tiny import logits, sequences, tiny_checkpoint
from safetensors.torch import load_file

import bc_plugin
from bc_plugin import Compensation
from bc_plugin.names import SUFFIX
from bc_plugin.refinement.gradients import weight_through as dequantized

FLAG = {"positions": 1, "held_out": 0.25}
GROUP_SIZE = 32


@pytest.fixture(scope="module", autouse=True)
def _on_cpu():
    with auto_gptq_on_cpu():
        yield


@pytest.fixture
def enabled():
    bc_plugin.enable("auto_gptq")
    yield bc_plugin
    bc_plugin.disable()


def _quantize(source, dtype=torch.float32, flag=FLAG, examples=None, **changes):
    settings = {"bits": 4, "group_size": GROUP_SIZE, "desc_act": False, **changes}
    config = BaseQuantizeConfig(**settings, bias_compensation=flag)
    model = AutoGPTQForCausalLM.from_pretrained(source, config, torch_dtype=dtype)
    model.quantize(examples or sequences(), use_triton=False)
    return model


def _load(folder, dtype=torch.float32, **kwargs):
    return AutoGPTQForCausalLM.from_quantized(
        str(folder), device="cpu", torch_dtype=dtype, **kwargs
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, _on_cpu):
    """A float folder, a compensated one, and the logits before saving."""
    folder = tmp_path_factory.mktemp("auto_gptq")
    source = tiny_checkpoint(folder / "float")
    bc_plugin.enable("auto_gptq")
    try:
        model = _quantize(source)
        model.save_quantized(folder / "out", use_safetensors=True)
    finally:
        bc_plugin.disable()
    return source, folder / "out", logits(model.model)


@pytest.mark.parametrize("positions", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_quantize_save_load(tmp_path, enabled, architecture, dtype, positions):
    source = tiny_checkpoint(tmp_path / "float", architecture, dtype)
    model = _quantize(source, dtype, {"positions": positions})
    compensation = Compensation.attached_to(model.model)
    assert all(e.after <= e.before for e in compensation.errors.values())
    model.save_quantized(tmp_path / "out", use_safetensors=True)
    loaded = _load(tmp_path / "out", dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(
        logits(loaded.model), logits(model.model), rtol=tolerance, atol=tolerance
    )
    Compensation.attached_to(loaded.model).detach(loaded.model)
    assert (logits(loaded.model) - logits(model.model)).abs().max() > 10 * tolerance


@pytest.mark.parametrize("desc_act", [False, True], ids=["plain", "act-order"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_width(tmp_path, enabled, bits, desc_act):
    source = tiny_checkpoint(tmp_path / "float")
    model = _quantize(source, bits=bits, desc_act=desc_act)
    model.save_pretrained(tmp_path / "out")
    torch.testing.assert_close(
        logits(_load(tmp_path / "out").model), logits(model.model), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zero_points_of_zero(tmp_path, enabled, monkeypatch, bits):
    """AutoGPTQ packs a zero point less one, and -1 spoils that of the channels beside it."""
    config = BaseQuantizeConfig(bits, GROUP_SIZE, desc_act=False, sym=False, bias_compensation=FLAG)
    source = tiny_checkpoint(tmp_path / "float")
    model = AutoGPTQForCausalLM.from_pretrained(source, config, torch_dtype=torch.float32)
    linear = model.model.model.layers[0].mlp.up_proj
    linear.weight.data[4].abs_()
    meant = {}
    free = GPTQ.free

    def freed(gptq):
        meant[gptq.layer] = gptq.layer.weight.detach().clone()
        free(gptq)

    monkeypatch.setattr(GPTQ, "free", freed)
    model.quantize(sequences(), use_triton=False)
    kernel = model.model.model.layers[0].mlp.up_proj
    Compensation.attached_to(model.model).detach(model.model)
    packed = dequantized(kernel, kernel.infeatures, torch.zeros(()))
    torch.testing.assert_close(packed.T, meant[linear], rtol=1e-2, atol=1e-4)


def test_without_the_plugin_the_plain_model_loads(checkpoint, tmp_path):
    bc_plugin.enable("auto_gptq")
    model = _quantize(checkpoint[0], flag={**FLAG, "joint": False})
    compensated, out = logits(model.model), tmp_path / "out"
    model.save_quantized(out, use_safetensors=True)
    bc_plugin.disable()
    plain = _load(out)
    assert (logits(plain.model) - compensated).abs().max() > 1e-3
    Compensation.load(out).attach(plain.model)
    torch.testing.assert_close(logits(plain.model), compensated, rtol=1e-5, atol=1e-5)


def test_both_configs_carry_the_entry_and_no_vector_travels_as_a_bias(checkpoint):
    _, out, _ = checkpoint
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    own = json.loads((out / "quantize_config.json").read_text())
    assert own["bias_compensation"] == config["bias_compensation"]
    (file,) = out.glob("*.safetensors")
    tensors = load_file(file)
    assert sum(name.endswith(SUFFIX) for name in tensors) == 16
    # AutoGPTQ stores a bias of zeros for every layer that had none, which other loaders drop.
    biases = [tensor for name, tensor in tensors.items() if name.endswith("_proj.bias")]
    assert biases and not any(bias.any() for bias in biases)


def test_loaded_and_saved_again(checkpoint, tmp_path, enabled):
    _, out, expected = checkpoint
    _load(out).save_quantized(tmp_path, use_safetensors=True)
    torch.testing.assert_close(logits(_load(tmp_path).model), expected, rtol=1e-5, atol=1e-5)


def test_quantize_overrides_the_config(checkpoint, enabled):
    source, _, _ = checkpoint
    config = BaseQuantizeConfig(bits=4, group_size=GROUP_SIZE, bias_compensation=True)
    model = AutoGPTQForCausalLM.from_pretrained(source, config, torch_dtype=torch.float32)
    model.quantize(sequences(), bias_compensation={"positions": 2})
    assert Compensation.attached_to(model.model).positions == 2
    model = AutoGPTQForCausalLM.from_pretrained(source, config, torch_dtype=torch.float32)
    model.quantize(sequences(), bias_compensation=False)
    assert Compensation.attached_to(model.model) is None
    assert "bias_compensation" not in model.quantize_config.to_dict()


def test_sharded_checkpoints(checkpoint, tmp_path, enabled):
    from huggingface_hub import save_torch_state_dict

    _, out, expected = checkpoint
    (file,) = out.glob("*.safetensors")
    save_torch_state_dict(load_file(file), tmp_path, max_shard_size="50KB")
    for name in ("config.json", "quantize_config.json"):
        settings = json.loads((out / name).read_text())
        own = settings.get("quantization_config", settings)
        own["model_file_base_name"] = "model"
        (tmp_path / name).write_text(json.dumps(settings))
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    torch.testing.assert_close(logits(_load(tmp_path).model), expected, rtol=1e-5, atol=1e-5)


def test_push_to_hub_uploads_the_vectors(checkpoint, tmp_path, enabled, monkeypatch):
    from auto_gptq.modeling import _base

    commits = []
    repository = SimpleNamespace(repo_id="someone/compensated")
    monkeypatch.setattr(_base, "create_repo", lambda **_: repository)
    monkeypatch.setattr(_base, "create_commit", lambda **given: commits.append(given))
    model = _quantize(checkpoint[0])
    model.push_to_hub("someone/compensated", save_dir=str(tmp_path / "out"))
    files = {add.path_in_repo: Path(add.path_or_fileobj) for add in commits[0]["operations"]}
    (tensors,) = (load_file(path) for name, path in files.items() if name.endswith(".safetensors"))
    assert sum(name.endswith(SUFFIX) for name in tensors) == 16
    for name in ("config.json", "quantize_config.json"):
        assert "bias_compensation" in files[name].read_text()


# What must not pass in silence

NAME = "model.layers.0.mlp.down_proj"


def test_without_enable_the_flag_is_an_error():
    with pytest.raises(TypeError, match="bias_compensation"):
        BaseQuantizeConfig(bias_compensation=True)
