"""``bc-plugin compensate``, ``refine``, ``export``: llm-compressor's weights of 2 to 8 bits."""

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("llmcompressor", reason="needs llm-compressor")

from rig.quantizers.with_llmcompressor import quantize
from rig.subjects.tiny import logits, sequences, tiny_inputs
from transformers import AutoModelForCausalLM

import bc_plugin
from bc_plugin import Compensation
from bc_plugin.cli import app

STEPS = ("--steps", 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("widths")
    tiny_inputs(folder, 12)
    return folder


@pytest.fixture(autouse=True)
def _disable_afterwards():
    yield
    bc_plugin.disable()


def _run(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output


def _logits(folder):
    return logits(AutoModelForCausalLM.from_pretrained(folder))


@pytest.mark.parametrize("sym", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_a_checkpoint_goes_through_all_commands(folder, tmp_path, bits, sym):
    settings = {"bits": bits, "group_size": 32, "sym": sym, "method": "nearest"}
    model = quantize(folder / "float", sequences(), None, settings)
    model.save_pretrained(tmp_path / "plain")
    data = ("--dataset", folder / "text.txt", "--length", 24)
    pair = (tmp_path / "plain", folder / "float")
    _run("compensate", *pair, tmp_path / "out", "--positions", 0, *data)
    _run("refine", tmp_path / "out", folder / "float", tmp_path / "refined", *STEPS, *data)
    for engine in ("transformers", "vllm"):
        _run("export", tmp_path / "refined", tmp_path / engine, "--for", engine)
    bc_plugin.enable()
    compensated, refined = (Compensation.load(tmp_path / name) for name in ("out", "refined"))
    assert all(errors.after <= errors.before for errors in compensated.errors.values())
    assert refined.refined["after"] <= refined.refined["before"]
    expected = _logits(tmp_path / "refined")
    bc_plugin.disable()
    # Training may come to what needs no vectors.
    tolerance = 0.01 * (expected - _logits(tmp_path / "plain")).norm() + 1e-6 * expected.norm()
    for engine in ("transformers", "vllm"):  # nothing has to be widened for vLLM
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / engine)
        (scheme,) = loaded.config.quantization_config.quantization_config.config_groups.values()
        assert (scheme.weights.num_bits, scheme.weights.symmetric) == (bits, sym)
        assert (logits(loaded) - expected).norm() < tolerance
    assert torch.isfinite(expected).all()
