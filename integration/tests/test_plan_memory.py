"""What a plan says of memory is within a quarter of what commands hold (``make test-memory``)."""

import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("gptqmodel", reason="needs the gptq extra")
if not os.environ.get("TEST_MEMORY"):
    pytest.skip("wants the machine for itself: make test-memory", allow_module_level=True)

from rig.memory import measured
from rig.subjects.large import GROUP_SIZE, SHAPES, write_pair

import bc_plugin
from bc_plugin import RefinementConfig

TOOLKITS = "import optimum.gptq, gptqmodel"  # that the loading of a GPTQ model imports
DATA = {"samples": 4, "length": 512}
FEW = {"samples": 3, "length": 256}
REFINEMENTS = {
    "vectors": ((), {}),
    "scales": (("--train", "vectors scales"), {"train": ("vectors", "scales")}),
    "checkpointing": (("--gradient-checkpointing",), {"gradient_checkpointing": True}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A float model of 8 blocks, and its packed one."""
    folder = tmp_path_factory.mktemp("models")
    write_pair(folder, SHAPES["small"], 8, torch.float32)
    return folder


def _plan(folder, data, refinement=None):
    given = {"group_size": GROUP_SIZE, "flops_per_second": 1e12, **data}
    return bc_plugin.plan(folder / "float", True, refinement, **given).stages


def _data(folder, data):
    numbers = (f"--{name}={value}" for name, value in data.items())
    return ("--dataset", folder / "text.txt", *numbers, "--device-map", "cpu")


def _compensate(folder, out, data, log: Path):
    models = (folder / "quantized", folder / "float", out)
    return measured(["compensate", *models, *_data(folder, data)], log, TOOLKITS)


def test_the_pass(folder, tmp_path):
    found = _compensate(folder, tmp_path / "out", DATA, tmp_path / "log")
    expected = sum(_plan(folder, DATA)["pass"].memory.values())
    assert found.resident == pytest.approx(expected, rel=0.25)


@pytest.fixture(scope="module")
def compensated(folder):
    _compensate(folder, folder / "compensated", FEW, folder / "log")
    return folder / "compensated"


@pytest.mark.parametrize("name", REFINEMENTS)
def test_refinement(folder, compensated, tmp_path, name):
    options, settings = REFINEMENTS[name]
    models = (compensated, folder / "float", tmp_path / "out")
    command = ["refine", *models, *_data(folder, FEW), "--steps", 1, *options]
    found = measured(command, tmp_path / "log", TOOLKITS)
    stages = _plan(folder, FEW, RefinementConfig(steps=1, **settings))
    expected = sum(stages["refinement"].memory.values())
    # The float model's pages, of which no more is held by then, are those of its files.
    assert found.anonymous == pytest.approx(expected, rel=0.25)
