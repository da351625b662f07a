"""The command line, end to end on a tiny model."""

import json

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("gptqmodel", reason="needs the gptq extra")

from rig.subjects.tiny import logits, tiny_inputs
from transformers import AutoModelForCausalLM

import bc_plugin
from bc_plugin import BiasCompensationError, Compensation
from bc_plugin.cli import app

DATA = ["--length", "24"]


@pytest.fixture(autouse=True)
def _disable_afterwards():
    yield
    bc_plugin.disable()


def _run(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A float model with its tokenizer, text, and what ``quantize`` makes of them."""
    folder = tmp_path_factory.mktemp("cli")
    tiny_inputs(folder, 12)
    _run(
        *("quantize", folder / "float", folder / "out", "--dataset", folder / "text.txt"),
        *("--bits", 3, "--group-size", 32, "--samples", 8, *DATA),
        *("--damp", 0.01, "--no-act-group-aware", "--no-sym"),
    )
    bc_plugin.disable()
    return folder


def test_quantize_writes_a_compensated_checkpoint(folder):
    assert len(Compensation.load(folder / "out").vectors) == 16
    config = json.loads((folder / "out" / "config.json").read_text())
    assert config["quantization_config"]["dataset"] is None
    as_published = {"damp_percent": 0.01, "act_group_aware": False, "sym": False}
    assert as_published.items() <= config["quantization_config"].items()
    assert (folder / "out" / "tokenizer.json").is_file()


@pytest.mark.parametrize("option", ["--positions=0", "--positions=all", "--sites=linear"])
def test_compensate_takes_a_quantized_checkpoint(folder, tmp_path, option):
    arguments = ("compensate", folder / "out", folder / "float", tmp_path / "new", option)
    _run(*arguments, "--dataset", folder / "text.txt", *DATA)
    bc_plugin.enable()
    new, old = (
        AutoModelForCausalLM.from_pretrained(f / "") for f in (tmp_path / "new", folder / "out")
    )
    assert not torch.equal(logits(new), logits(old))
    new, old = (AutoModelForCausalLM.from_pretrained(f) for f in (tmp_path / "new", folder / "out"))
    for model in (new, old):  # not run yet: kernels repack their weights when they are
        Compensation.attached_to(model).detach(model)
    assert torch.equal(logits(new), logits(old))


def test_a_joint_checkpoint_keeps_its_linears_vectors(folder, tmp_path):
    arguments = ("compensate", folder / "out", folder / "float", tmp_path / "new")
    with pytest.raises(BiasCompensationError, match="keep linear among the sites"):
        _run(*arguments, "--sites=block", "--dataset", folder / "text.txt", *DATA)
    assert Compensation.load(folder / "out").joint
    _run(*arguments, "--dataset", folder / "text.txt", *DATA)
    assert Compensation.load(tmp_path / "new").joint


def test_refine_takes_a_compensated_checkpoint(folder, tmp_path):
    arguments = (folder / "float", tmp_path / "new", "--dataset", folder / "text.txt", *DATA)
    out = _run("refine", folder / "out", *arguments, "--steps", 2, "--by", "block")
    assert "Refined by block in 2 steps" in out
    refined = Compensation.load(tmp_path / "new")
    assert refined.joint and refined.digest == Compensation.load(folder / "out").digest
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    (tmp_path / "new").rename(tmp_path / "first")
    out = _run("refine", tmp_path / "first", *arguments, "--steps", 2)
    assert "Refined by model in 2 steps" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "new"]


def test_scales_and_norms(folder, tmp_path):
    """Fitted, then trained: what loads them without the plugin has them as well."""
    data = ("--dataset", folder / "text.txt", *DATA)
    out = _run("compensate", folder / "out", folder / "float", tmp_path / "new", "--scales", *data)
    assert "scales=True" in out and "scales=False" in _run("inspect", folder / "out")
    trained = ("--train", "scales,norms", "--steps", 8)
    _run("refine", tmp_path / "new", folder / "float", tmp_path / "refined", *trained, *data)
    assert Compensation.load(tmp_path / "refined").refined["train"] == ["scales", "norms"]
    plain = [
        logits(AutoModelForCausalLM.from_pretrained(path))
        for path in (folder / "out", tmp_path / "new")
    ]
    assert not torch.equal(*plain)
    bc_plugin.enable()
    assert Compensation.attached_to(AutoModelForCausalLM.from_pretrained(tmp_path / "refined"))


def test_calibration_on_what_the_float_model_writes(folder, tmp_path):
    arguments = ("compensate", folder / "out", folder / "float", tmp_path / "new", *DATA)
    _run(*arguments, "--dataset", "self", "--samples", 4)
    assert Compensation.load(tmp_path / "new").vectors
    with pytest.raises(BiasCompensationError, match="neither a file"):
        _run("evaluate", folder / "out", "--dataset", "self", *DATA)


def test_refine_wants_a_compensated_checkpoint(folder, tmp_path):
    arguments = (folder / "float", tmp_path / "new", "--dataset", folder / "text.txt", *DATA)
    with pytest.raises(BiasCompensationError, match="bc-plugin compensate"):
        _run("refine", folder / "float", *arguments)


def test_evaluate(folder):
    arguments = ("evaluate", folder / "out", "--dataset", folder / "text.txt", *DATA, "--json")
    alone = json.loads(_run(*arguments))
    assert alone["kl"] is None
    reference = ("--reference", folder / "float")
    with_vectors = json.loads(_run(*arguments, *reference))
    without = json.loads(_run(*arguments, *reference, "--without-compensation"))
    assert with_vectors["perplexity"] == pytest.approx(alone["perplexity"])
    assert with_vectors["kl"] != without["kl"]
    assert "top-1 agreement" in _run(*arguments[:-1], *reference)


def test_evaluating_without_a_compensation_that_is_not_there_is_refused(folder):
    arguments = ("evaluate", folder / "float", "--dataset", folder / "text.txt", *DATA)
    with pytest.raises(BiasCompensationError, match="is not compensated"):
        _run(*arguments, "--without-compensation")


def test_inspect(folder):
    output = _run("inspect", folder / "out")
    assert "16 sites" in output and "positions=1" in output
    assert output.count("\n") < _run("inspect", folder / "out", "--all").count("\n")


def test_nothing_is_overwritten_and_nothing_half_written(folder, tmp_path):
    with pytest.raises(BiasCompensationError, match="exists already"):
        _run("quantize", folder / "float", folder / "out", "--dataset", folder / "text.txt")
    with pytest.raises(BiasCompensationError, match="nothing to compensate"):
        _run(
            *("compensate", folder / "float", folder / "float", tmp_path / "new"),
            *("--dataset", folder / "text.txt", *DATA),
        )
    assert list(tmp_path.iterdir()) == []


def test_every_command_has_help_with_an_example():
    for command in ("quantize", "compensate", "evaluate", "inspect"):
        assert f"Example: bc-plugin {command}" in " ".join(_run(command, "--help").split())
