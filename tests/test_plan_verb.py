"""A plan beside what it is of."""

import json

import pytest
import torch
from helpers.language import ARCHITECTURES, crudely_quantized, tiny_model, token_batches
from typer.testing import CliRunner

import bc_plugin
from bc_plugin import BiasCompensationError, RefinementConfig
from bc_plugin.cli import app
from bc_plugin.costs import rate


@pytest.fixture
def folder(tmp_path):
    tiny_model().config.save_pretrained(tmp_path / "float")
    return tmp_path / "float"


@pytest.mark.parametrize("positions", [0, 1, "all"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_vectors_have_the_size_that_was_planned(architecture, positions, tmp_path):
    model = tiny_model(architecture)
    model.config.save_pretrained(tmp_path)
    settings = {"positions": positions, "held_out": 0}
    plan = bc_plugin.plan(tmp_path, settings, samples=6, length=16, flops_per_second=1.0)
    found = bc_plugin.compensate(crudely_quantized(model), model, token_batches(), settings)
    assert plan.vectors == found.nbytes
    assert plan.tokens == 6 * 16


def test_devices_share_the_sequences(folder):
    config, given = RefinementConfig(), {"samples": 64, "length": 512, "flops_per_second": 1e9}
    one, four = (bc_plugin.plan(folder, True, config, devices=n, **given) for n in (1, 4))
    for name, stage in one.stages.items():
        assert four.stages[name].seconds == pytest.approx(stage.seconds / 4)
        assert four.stages[name].flops == stage.flops
    assert 4 * four.stages["pass"].memory["activations"] == one.stages["pass"].memory["activations"]
    packed = (plan.stages["refinement"].memory["packed model"] for plan in (one, four))
    assert len(set(packed)) == 1


def test_a_refinement_of_one_sequence_is_refused(folder):
    with pytest.raises(BiasCompensationError, match="at least two calibration sequences"):
        bc_plugin.plan(folder, True, RefinementConfig(), samples=1, flops_per_second=1.0)


def test_the_rate_is_the_best_and_matrices_grow_until_it_would_take_long(monkeypatch):
    sizes = []

    def seconds(matrix):
        sizes.append(len(matrix))
        return 2 * len(matrix) ** 3 / (1e10 if len(matrix) > 256 else 1e9)

    monkeypatch.setattr(rate, "_seconds", seconds)
    assert rate.product_rate(torch.bfloat16) == pytest.approx(1e10)
    assert sizes == [128, 256, 512, 1024]  # which takes 0.2 s


def test_the_command_prints_what_the_function_gives(folder):
    options = ["--refine-steps", "8", "--tflops", "0.5", "--positions", "2", "--devices", "2"]
    run = CliRunner().invoke(app, ["plan", str(folder), *options, "--json"])
    config = {"positions": 2}
    plan = bc_plugin.plan(
        folder, config, RefinementConfig(steps=8), devices=2, flops_per_second=0.5e12
    )
    assert json.loads(run.stdout) == json.loads(json.dumps(plan.to_dict()))
    said = CliRunner().invoke(app, ["plan", str(folder), *options]).stdout
    assert f"{plan.vectors:,} bytes" in said and "refinement" in said
