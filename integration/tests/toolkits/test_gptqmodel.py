"""GPTQModel's own pipeline, beyond what every toolkit has to do."""

import pytest
import torch

pytest.importorskip("gptqmodel", reason="needs the gptq extra")

from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from rig.subjects.tiny import logits, sequences, tiny_checkpoint, tiny_tokenizer
from transformers import AutoModelForCausalLM

from bc_plugin import BiasCompensationError, Compensation
from bc_plugin.toolkits.joint import CentredInputs

FLAG = {"positions": 1, "held_out": 0.25}
AWQ = {"method": "awq", "format": "gemm", "sym": False}


def _float(folder, architecture="llama"):
    folder.mkdir(exist_ok=True)
    tiny_tokenizer().save_pretrained(folder)
    return tiny_checkpoint(folder, architecture, torch.bfloat16)


def _quantize(source, flag=FLAG, calibration=None, option=None, batch_size=1, **changes):
    settings = {"bits": 4, "group_size": 32, "device": "cpu", **changes}
    qmodel = GPTQModel.load(source, QuantizeConfig(**settings, bias_compensation=flag))
    backend = BACKEND.AWQ_TORCH if changes.get("method") == "awq" else BACKEND.AUTO
    option = {} if option is None else {"bias_compensation": option}
    calibration = calibration or sequences()
    qmodel.quantize(calibration, backend=backend, batch_size=batch_size, **option)
    return qmodel


def _load(folder):
    return GPTQModel.load(str(folder), device="cpu")


@pytest.mark.parametrize("positions", [0, 1])
@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_saved_loaded_and_saved_again(tmp_path, enabled, architecture, positions):
    qmodel = _quantize(_float(tmp_path / "float", architecture), {"positions": positions})
    qmodel.save(str(tmp_path / "out"))
    loaded = _load(tmp_path / "out")
    expected = logits(loaded.model)
    loaded.save(str(tmp_path / "again"))
    again = _load(tmp_path / "again")
    assert (
        Compensation.attached_to(again.model).digest == Compensation.load(tmp_path / "out").digest
    )
    torch.testing.assert_close(logits(again.model), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "settings", [{"bits": 2}, {"bits": 3}, {"bits": 8}, {"desc_act": True}, {"sym": False}, AWQ]
)
def test_transformers_loads_what_it_saves(tmp_path, enabled, settings):
    _quantize(_float(tmp_path / "float"), **settings).save(str(tmp_path / "out"))
    ours = _load(tmp_path / "out").model
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=ours.dtype)
    assert Compensation.attached_to(theirs).entry() == Compensation.attached_to(ours).entry()
    together = (logits(ours) - logits(theirs)).abs().max()
    for model in (ours, theirs):
        Compensation.attached_to(model).detach(model)
    # Some kernels round differently in the two, with the vectors and without.
    assert together <= 1.5 * (logits(ours) - logits(theirs)).abs().max()


@pytest.mark.parametrize("batch_size", [1, 4])
def test_padded_batches_count_real_tokens_only(tmp_path, enabled, monkeypatch, batch_size):
    counts = []
    finish = CentredInputs.finish

    def noted(inputs, hessian, samples):
        counts.append([*inputs.count.tolist(), samples])
        finish(inputs, hessian, samples)

    monkeypatch.setattr(CentredInputs, "finish", noted)
    calibration = sequences(6) + sequences(6, length=15)
    _quantize(_float(tmp_path / "float"), True, calibration, batch_size=batch_size)
    tokens = 6 * 24 + 6 * 15
    assert len(counts) == 14 and all(count == [12, tokens - 12, tokens] for count in counts)


def test_quantize_overrides_the_config(tmp_path, enabled):
    source = _float(tmp_path / "float")
    qmodel = _quantize(source, option={"positions": 2})
    assert Compensation.attached_to(qmodel.model).positions == 2
    qmodel = _quantize(source, option=False)
    assert Compensation.attached_to(qmodel.model) is None
    assert "bias_compensation" not in qmodel.quantize_config.to_dict()


def test_sharded(tmp_path, enabled):
    qmodel = _quantize(_float(tmp_path / "float"))
    qmodel.save(str(tmp_path / "whole"))
    qmodel.save(str(tmp_path / "shards"), max_shard_size="50KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    whole, shards = (logits(_load(tmp_path / name).model) for name in ("whole", "shards"))
    assert torch.equal(whole, shards)


def test_another_objective_is_quantized_as_it_is(tmp_path, enabled):
    from gptqmodel.quantization.config import GPTAQConfig

    qmodel = _quantize(_float(tmp_path / "float"), gptaq=GPTAQConfig(device="cpu"))
    assert not Compensation.attached_to(qmodel.model).joint


def test_a_method_that_cannot_honour_the_flag_says_so(tmp_path, enabled):
    with pytest.raises(BiasCompensationError, match=r"method .* cannot honour it"):
        _quantize(_float(tmp_path / "float"), method="fp8", format="float8_e4m3fn", bits=8)


def test_weights_on_disk_are_refused(tmp_path, enabled):
    with pytest.raises(BiasCompensationError, match="offload_to_disk=False"):
        _quantize(_float(tmp_path / "float"), offload_to_disk=True)


def test_a_loader_that_passes_the_vectors_by_is_refused(tmp_path, enabled, monkeypatch):
    from gptqmodel.models import loader

    _quantize(_float(tmp_path / "float")).save(str(tmp_path / "out"))
    monkeypatch.setattr(loader, "gptqmodel_post_init", lambda model, **_: model)
    with pytest.raises(BiasCompensationError, match="choose another backend"):
        _load(tmp_path / "out")
