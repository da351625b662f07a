"""Checkpoints of other quantizers that transformers loads: compensated afterwards, exported."""

import pytest
import torch

pytest.importorskip("bitsandbytes", reason="needs other quantizers")

from optimum.quanto import Calibration, QuantizedModelForCausalLM, qint4, qint8
from rig.quantizers.with_compressed_tensors import round_to_nearest
from rig.subjects.tiny import logits, sequences, tiny_checkpoint
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import bc_plugin
from bc_plugin import Compensation

CPU = {"": "cpu"}
CONFIGS = {
    "8 bits": ({"load_in_8bit": True}, torch.float32),
    "4 bits": ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, torch.bfloat16),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_bitsandbytes(tmp_path, enabled, kind):
    settings, dtype = CONFIGS[kind]
    source = tiny_checkpoint(tmp_path / "float", dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=BitsAndBytesConfig(**settings), device_map=CPU, dtype=dtype
    )
    reference = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    compensation = bc_plugin.compensate(model, reference, sequences(), {"positions": 0})
    assert all(errors.after <= errors.before for errors in compensation.errors.values())
    compensation.attach(model)
    model.save_pretrained(tmp_path / "out")  # before it runs: its CPU kernel repacks with losses
    _check_loading_and_export(tmp_path, model, compensation, dtype)


def test_compressed_tensors(tmp_path, enabled):
    source = tiny_checkpoint(tmp_path / "float")
    round_to_nearest(source, tmp_path / "quantized")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    reference = AutoModelForCausalLM.from_pretrained(source)
    compensation = bc_plugin.compensate(model, reference, sequences(), {"positions": 0})
    assert all(errors.after <= errors.before for errors in compensation.errors.values())
    compensation.attach(model)
    model.save_pretrained(tmp_path / "out")
    _check_loading_and_export(tmp_path, model, compensation, torch.float32)


def test_a_compensated_model_that_compressed_tensors_offloads(tmp_path, enabled):
    """What it puts in a forward's place calls the function that was there with the module."""
    offload = pytest.importorskip("compressed_tensors.offload", reason="older ones cannot")
    source = tiny_checkpoint(tmp_path / "float")
    round_to_nearest(source, tmp_path / "quantized")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    reference = AutoModelForCausalLM.from_pretrained(source)
    compensation = bc_plugin.compensate(model, reference, sequences())
    compensation.attach(model)
    model.save_pretrained(tmp_path / "out")
    expected = logits(model)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for block in loaded.model.layers:
        offload.offload_module(block, "cpu", "cpu")
    torch.testing.assert_close(logits(loaded), expected)
    Compensation.attached_to(loaded).detach(loaded)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    assert torch.equal(logits(loaded), logits(plain))


def test_quanto_with_quantized_activations(tmp_path, enabled):
    source = tiny_checkpoint(tmp_path / "float")
    reference = AutoModelForCausalLM.from_pretrained(source)
    wrapper = QuantizedModelForCausalLM.quantize(
        AutoModelForCausalLM.from_pretrained(source),
        weights=qint4,
        activations=qint8,
        exclude="lm_head",
    )
    with Calibration(), torch.no_grad():
        for batch in sequences():
            wrapper(**batch)
    # Loaded again it quantizes more outputs than before it was saved, with or without vectors.
    wrapper.save_pretrained(tmp_path / "out")
    model = QuantizedModelForCausalLM.from_pretrained(tmp_path / "out")._wrapped
    compensation = bc_plugin.compensate(model, reference, sequences())
    assert all(errors.after <= errors.before for errors in compensation.errors.values())
    compensation.attach(model)
    # Its loader drops whatever it does not know: the vectors travel in a file of their own.
    compensation.save(tmp_path / "out")
    loaded = QuantizedModelForCausalLM.from_pretrained(tmp_path / "out")._wrapped
    Compensation.load(tmp_path / "out").attach(loaded)
    assert torch.equal(logits(loaded), logits(model))


def _check_loading_and_export(tmp_path, model, compensation, dtype):
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map=CPU, dtype=dtype)
    assert Compensation.attached_to(loaded).digest == compensation.digest
    expected = logits(loaded)
    torch.testing.assert_close(expected, logits(model), rtol=1e-2, atol=1e-2)
    bc_plugin.export(tmp_path / "out", tmp_path / "plain")
    bc_plugin.disable()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", device_map=CPU, dtype=dtype)
    tolerance = 4 * torch.finfo(dtype).eps * expected.norm() + 1e-4
    assert (logits(plain) - expected).norm() < tolerance
