"""A jointly quantized checkpoint in processes without the plugin, and in those with it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("gptqmodel", reason="needs the gptq extra")

from rig.quantizers.pipelines import PIPELINES
from rig.subjects.tiny import logits, sequences, tiny_checkpoint, tiny_tokenizer

import bc_plugin
from bc_plugin import Compensation
from bc_plugin.vectors.joint import joint_linears
from bc_plugin.vectors.sealed import NEEDS, unseal

PIPELINE = PIPELINES["transformers"]
# Of a folder, with what it is loaded; every loader's error, or None, as a JSON list.
WITHOUT = """
import json, sys
from transformers import AutoModel, AutoModelForCausalLM, pipeline
from gptqmodel import GPTQModel
loaders = (
    AutoModelForCausalLM.from_pretrained,
    AutoModel.from_pretrained,
    lambda folder: pipeline("text-generation", model=folder),
    lambda folder: GPTQModel.load(folder, device="cpu"),
)
errors = []
for load in loaders:
    try:
        load(sys.argv[1])
        errors.append(None)
    except Exception as error:
        errors.append(str(error))
assert "bc_plugin" not in sys.modules
print("ERRORS", json.dumps(errors))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Jointly quantized: a checkpoint with its vectors, one that was saved without, and logits."""
    source, folder, without = (
        tmp_path_factory.mktemp(name) for name in ("float", "out", "without")
    )
    tiny_checkpoint(source)
    bc_plugin.enable()
    try:
        settings = {"bits": 4, "group_size": 32, **PIPELINE.settings}
        model = PIPELINE.quantize(str(source), sequences(), {"positions": 1}, settings)
        assert model.config.quantization_config.bits == 4  # in memory as ever
        PIPELINE.save(model, folder)
        compensation = Compensation.attached_to(model)
        compensation.detach(model)
        model.save_pretrained(without)
        compensation.attach(model)
        before = logits(model)  # after saving: some kernels repack their weights
    finally:
        bc_plugin.disable()
    for out in (folder, without):
        tiny_tokenizer().save_pretrained(out)
    return folder, without, before


def _errors(folder):
    command = [sys.executable, "-c", WITHOUT, str(folder)]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    line = next(line for line in run.stdout.splitlines() if line.startswith("ERRORS"))
    return json.loads(line.removeprefix("ERRORS"))


@pytest.mark.parametrize("which", [0, 1], ids=["with its vectors", "saved without"])
def test_every_loader_stops_and_says_what_it_needs(saved, which):
    errors = _errors(saved[which])
    assert [error is not None and NEEDS in error for error in errors] == [True] * 4


def _as_before_it_was_sealed(folder, out):
    shutil.copytree(folder, out)
    path = Path(out) / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = unseal(config["quantization_config"])
    path.write_text(json.dumps(config))
    return out


def test_what_was_written_before_loads_with_the_plugin(saved, tmp_path, enabled):
    folder, _, before = saved
    old = _as_before_it_was_sealed(folder, tmp_path / "old")
    assert json.loads((old / "config.json").read_text())["quantization_config"]["bits"] == 4
    for which in (folder, old):
        torch.testing.assert_close(logits(PIPELINE.load(which)), before, rtol=1e-4, atol=1e-4)


def test_it_stays_sealed_however_often_it_is_saved(saved, tmp_path, enabled):
    folder, _, before = saved
    for number in range(2):
        model = PIPELINE.load(folder)
        folder = tmp_path / str(number)
        model.save_pretrained(folder)
        assert (
            json.loads((folder / "config.json").read_text())["quantization_config"]["bits"] == NEEDS
        )
    torch.testing.assert_close(logits(PIPELINE.load(folder)), before, rtol=1e-4, atol=1e-4)


def test_saved_without_its_vectors_it_can_be_given_them_back(saved, enabled):
    folder, without, before = saved
    with pytest.warns(
        UserWarning, match=r"quantized jointly with vectors that it was saved without"
    ):
        model = PIPELINE.load(without)
    assert len(joint_linears(model)) == 14
    Compensation.load(folder).attach(model)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
