"""AutoRound: its checkpoints, in each format as transformers loads it, compensated afterwards."""

import pytest
from typer.testing import CliRunner

pytest.importorskip("auto_round", reason="needs AutoRound: make test-autoround")
pytest.importorskip("gptqmodel", reason="needs the gptq extra, for kernels")

from rig.quantizers.with_autoround import load, round_and_save
from rig.subjects.tiny import logits, sequences, tiny_inputs
from transformers import AutoModelForCausalLM

import bc_plugin
from bc_plugin import Compensation
from bc_plugin.cli import app

CASES = [
    ("auto_round", 2, False),
    ("auto_round", 3, False),
    ("auto_round", 4, True),
    ("auto_round", 4, False),
    ("auto_gptq", 2, False),
    ("auto_gptq", 4, True),
    ("auto_awq", 4, False),
    ("llm_compressor", 3, False),
    ("llm_compressor", 4, True),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("autoround")
    tiny_inputs(folder, 8)
    return folder


@pytest.mark.parametrize(("form", "bits", "sym"), CASES)
def test_a_checkpoint_is_compensated_and_loads_so(folder, tmp_path, enabled, form, bits, sym):
    settings = {"bits": bits, "group_size": 32, "sym": sym, "format": form, "iters": 4}
    round_and_save(str(folder / "float"), sequences(), tmp_path / "rounded", settings)
    data = ("--dataset", folder / "text.txt", "--length", 24)
    command = ("compensate", tmp_path / "rounded", folder / "float", tmp_path / "out", *data)
    result = CliRunner().invoke(app, [str(a) for a in command], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    bc_plugin.enable()
    plain, loaded = load(tmp_path / "rounded"), load(tmp_path / "out")
    reference = AutoModelForCausalLM.from_pretrained(folder / "float")
    found = Compensation.attached_to(loaded)
    assert len(found.vectors) == 2 * 8
    assert all(errors.after <= errors.before for errors in found.errors.values())
    by_hand = bc_plugin.compensate(plain, reference, sequences())
    assert by_hand.digest == found.digest
    for name, vectors in by_hand.vectors.items():
        apart = (found.vectors[name] - vectors).float().norm()
        assert apart < 0.05 * vectors.float().norm()  # some kernels multiply in half precision
    without, given = logits(load(tmp_path / "rounded")), logits(loaded)
    by_hand.attach(plain)
    assert (given - logits(plain)).norm() < 0.1 * (given - without).norm()
