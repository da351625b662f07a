"""Checkpoints that ``bc-plugin compensate`` reads block by block, as toolkits write them."""

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("gptqmodel", reason="needs the gptq extra")

from rig.quantizers import with_gptqmodel
from rig.quantizers.with_compressed_tensors import round_to_nearest
from rig.subjects.tiny import logits, sequences, tiny_inputs
from transformers import AutoModelForCausalLM

import bc_plugin
from bc_plugin import Compensation
from bc_plugin.cli import app
from bc_plugin.streaming import load
from bc_plugin.streaming.errors import CannotStream
from bc_plugin.toolkits.load import keeping_weights
from bc_plugin.vectors.weights import weights_of

SETTINGS = {
    "gptq-3": {"bits": 3, "group_size": 32, "desc_act": False},
    "gptq-4": {"bits": 4, "group_size": 32, "desc_act": True, "act_group_aware": False},
    "awq": {"bits": 4, "group_size": 32, "method": "awq", "format": "gemm"},
}
COMPRESSED = {
    "compressed-4": {},
    "compressed-4-ordered": {"symmetric": False, "actorder": True},
    "compressed-3": {"symmetric": False, "bits": 3},
    "compressed-8": {"bits": 8},
}
KEEP_SCALES = {"gptq-3", *COMPRESSED}  # where the loaded model's kernel does not repack them
# How far logits may be off, relative to their norm. The whole model's kernel is the one that
# transformers chooses: of 3 bits it multiplies as we do, of 4 bits PyTorch's, in bfloat16.
OFF = {"gptq-4": 0.05, "awq": 0.05}


@pytest.fixture(scope="module", params=[*SETTINGS, *COMPRESSED])
def quantized(request, tmp_path_factory):
    """Which format, and a folder with a float model, its text, and a quantized checkpoint."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny_inputs(folder, 12)
    source, out = str(folder / "float"), folder / "quantized"
    if request.param in COMPRESSED:
        round_to_nearest(source, out, **COMPRESSED[request.param])
    else:
        qmodel = with_gptqmodel.quantize(source, sequences(), None, SETTINGS[request.param])
        with_gptqmodel.save(qmodel, out)
    return request.param, folder


@pytest.mark.parametrize("scales", [(), ("--scales",), ("--integers",)])
def test_a_streamed_pass_gives_the_checkpoint_of_a_loaded_one(
    quantized, tmp_path, monkeypatch, enabled, scales
):
    kind, folder = quantized
    if scales and kind not in KEEP_SCALES:
        pytest.skip("the loaded model's kernel has repacked its scales")

    def compensated(out):
        return _made("compensate", folder, folder / "quantized", out, *scales)

    found, expected = _streamed_and_whole(compensated, tmp_path, monkeypatch)
    assert (found - expected).norm() < OFF.get(kind, 1e-6) * expected.norm()
    one, other = (Compensation.load(tmp_path / name) for name in ("streamed", "whole"))
    assert one.digest == other.digest and one.vectors.keys() == other.vectors.keys()
    assert one.scales == other.scales == bool(scales)


def test_a_streamed_refinement_gives_the_checkpoint_of_a_loaded_one(
    quantized, tmp_path, monkeypatch, enabled
):
    kind, folder = quantized
    start = tmp_path / "start"
    _made("compensate", folder, folder / "quantized", start)

    def refined(out):
        return _made("refine", folder, start, out, "--by", "block", "--steps", 4)

    found, expected = _streamed_and_whole(refined, tmp_path, monkeypatch)
    assert (found - expected).norm() < OFF.get(kind, 1e-5) * expected.norm()
    one, other = (Compensation.load(tmp_path / name) for name in ("streamed", "whole"))
    assert one.digest == other.digest and one.refined["steps"] == other.refined["steps"]


def _streamed_and_whole(make, folder, monkeypatch):
    """Logits of what is made in both ways, in ``streamed`` and ``whole``."""
    found = logits(make(folder / "streamed"))
    with monkeypatch.context() as patch:
        patch.setattr(load, "open_streamed", _unknown)
        return found, logits(make(folder / "whole"))


def _made(command, folder, source, out, *more):
    """What a command makes of a checkpoint, loaded."""
    arguments = (command, source, folder / "float", out, *more)
    data = ("--dataset", folder / "text.txt", "--length", 24, "--dtype", "float32")
    CliRunner().invoke(app, [str(a) for a in (*arguments, *data)], catch_exceptions=False)
    bc_plugin.enable()
    return AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)


def _unknown(folder, *_, **__):
    raise CannotStream(folder, "not now")


def test_digests_are_those_of_the_toolkits_loader(quantized, enabled):
    folder = quantized[1] / "quantized"
    with keeping_weights():
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    paths = ["model.layers"]
    assert weights_of(load.open_streamed(folder), paths) == weights_of(loaded, paths)
