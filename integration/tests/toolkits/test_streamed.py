"""Checkpoints of GPTQModel that ``bc-plugin compensate`` reads block by block."""

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("gptqmodel", reason="needs the gptq extra")

from rig.quantizers import with_gptqmodel
from rig.subjects.tiny import logits, sequences, tiny_inputs
from transformers import AutoModelForCausalLM

import bc_plugin
from bc_plugin import Compensation
from bc_plugin.cli import app
from bc_plugin.streaming import load
from bc_plugin.toolkits.load import keeping_weights
from bc_plugin.vectors.weights import weights_of

SETTINGS = {
    "gptq-3": {"bits": 3, "group_size": 32, "desc_act": False},
    "gptq-4": {"bits": 4, "group_size": 32, "desc_act": True, "act_group_aware": False},
    "awq": {"bits": 4, "group_size": 32, "method": "awq", "format": "gemm"},
}
# How far logits may be off, relative to their norm. The whole model's kernel is the one that
# transformers chooses: of 3 bits it multiplies as we do, of 4 bits in bfloat16 (at::_weight_int4pack).
OFF = {"gptq-3": 1e-6, "gptq-4": 0.05, "awq": 0.05}


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("scales", [(), ("--scales",)])
def test_a_streamed_pass_gives_the_checkpoint_of_a_loaded_one(
    tmp_path, monkeypatch, enabled, kind, scales
):
    if scales and kind != "gptq-3":
        pytest.skip("its kernel repacks scales when it is loaded")
    tiny_inputs(tmp_path, 12)
    quantized = tmp_path / "quantized"
    qmodel = with_gptqmodel.quantize(tmp_path / "float", sequences(), None, SETTINGS[kind])
    with_gptqmodel.save(qmodel, quantized)

    def compensated(out):
        arguments = ("compensate", quantized, tmp_path / "float", out, "--dtype", "float32")
        data = ("--dataset", tmp_path / "text.txt", "--length", 24)
        done = CliRunner().invoke(app, [str(a) for a in (*arguments, *data, *scales)])
        assert done.exit_code == 0, done.output
        bc_plugin.enable()
        return AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)

    def unknown(folder, *_, **__):
        raise load.CannotStream(folder, "not now")

    found = logits(compensated(tmp_path / "streamed"))
    with monkeypatch.context() as patch:
        patch.setattr(load, "open_streamed", unknown)
        expected = logits(compensated(tmp_path / "whole"))
    assert (found - expected).norm() < OFF[kind] * expected.norm()
    one, other = (Compensation.load(tmp_path / name) for name in ("streamed", "whole"))
    assert one.digest == other.digest and one.vectors.keys() == other.vectors.keys()


@pytest.mark.parametrize("kind", SETTINGS)
def test_digests_are_those_of_the_toolkits_loader(tmp_path, enabled, kind):
    tiny_inputs(tmp_path, 12)
    qmodel = with_gptqmodel.quantize(tmp_path / "float", sequences(), None, SETTINGS[kind])
    with_gptqmodel.save(qmodel, tmp_path / "quantized")
    with keeping_weights():
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized", dtype="auto")
    streamed = load.open_streamed(tmp_path / "quantized")
    paths = ["model.layers"]
    assert weights_of(streamed, paths) == weights_of(loaded, paths)
