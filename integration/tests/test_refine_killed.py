"""``bc-plugin refine`` that is killed goes on to the same checkpoint, through GPTQModel's kernels.

They decide for good when first run, at 4 bits by whether a gradient is wanted then.
"""

import errno
from pathlib import Path

import pytest
import torch

pytest.importorskip("gptqmodel", reason="needs the gptq extra")

from helpers.killed import KILLED, in_a_new_process, kill_at
from rig.subjects.tiny import tiny_inputs
from typer.testing import CliRunner

import bc_plugin
from bc_plugin import BiasCompensationError, Compensation
from bc_plugin.cli import app
from bc_plugin.refinement import float_logits
from bc_plugin.refinement.progress import Progress
from bc_plugin.refinement.train import Training
from bc_plugin.toolkits import copy

# One after the other in one run, with looks after 8, 16 and 24 steps: what is not called again
# before the process is killed, and the number of the first step that it makes before.
KILLS = {
    "model": (
        ((float_logits, "save_file", 2, True), None),
        ((Training, "_step", 3), 0),
        ((Training, "_step", 11), 0),
        ((torch, "save", 1, True), 8),  # written, and not in its place
        ((Progress, "write", 2, True), 8),  # after the last look
        ((copy, "write_entry", 1, True), None),
    ),
    "block": (((Training, "_step", 30), 0), ((Progress, "write", 3, True), 0)),
}
IN_PLACE = (Path, "rename", 1, True)


def command(folder, out, by="model", *options):
    """What is typed, as a list."""
    data = ("--dataset", folder / "text.txt", "--length", 24, "--samples", 12)
    arguments = ("refine", folder / "compensated", folder / "float", out, *data, "--by", by)
    return [str(argument) for argument in (*arguments, "--steps", 24, *options)]


def run(folder, out, by, kill=None):
    """Refine in this process, perhaps to be killed; the first step is kept beside ``out``."""
    step, made = Training._step, []

    def counted(self, number):
        if not made:
            Path(f"{out}.first").write_text(str(number))
        made.append(number)
        return step(self, number)

    Path(f"{out}.first").write_text("None")
    Training._step = counted
    if kill is not None:
        kill_at(*(IN_PLACE if kill == "in place" else KILLS[by][kill][0]))
    app(command(folder, out, by), standalone_mode=False)


def contents(folder):
    """Every file's bytes, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A float model, text, and a checkpoint of 4 bits that was compensated with them."""
    folder = tmp_path_factory.mktemp("killed")
    tiny_inputs(folder, 16)
    arguments = ("quantize", folder / "float", folder / "compensated", "--bits", 4)
    data = ("--dataset", folder / "text.txt", "--samples", 8, "--length", 24)
    group = ("--group-size", 32)
    CliRunner().invoke(app, list(map(str, (*arguments, *data, *group))), catch_exceptions=False)
    bc_plugin.disable()
    return folder


@pytest.mark.parametrize("by", ["model", "block"])
def test_killed_again_and_again_it_comes_to_the_same_checkpoint(folder, tmp_path, by):
    assert in_a_new_process(run, folder, tmp_path / "whole", by) == 0
    out, first = tmp_path / "out", tmp_path / "out.first"
    for number, (_, expected) in enumerate(KILLS[by]):
        assert in_a_new_process(run, folder, out, by, number) == KILLED, number
        assert not out.exists() and first.read_text() == str(expected), number
    assert in_a_new_process(run, folder, out, by, "in place") == KILLED
    assert contents(out) == contents(tmp_path / "whole")
    assert Compensation.load(out).refined["steps"] == 24
    assert (tmp_path / "out.refining").is_dir()  # it was killed before that could be deleted
    with pytest.raises(BiasCompensationError, match="exists already"):
        CliRunner().invoke(app, command(folder, out, by), catch_exceptions=False)
    assert not (tmp_path / "out.refining").exists() and contents(out)


def test_a_full_disk_at_the_end_keeps_the_training(folder, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    out, steps = tmp_path / "out", []
    step = Training._step
    monkeypatch.setattr(Training, "_step", lambda *args: steps.append(args) or step(*args))
    arguments = command(folder, out, "model", "--learning-rate", "0.05")
    with monkeypatch.context() as patch:
        patch.setattr(copy, "write_tensors", full)
        said = rf"{out} cannot be written: .*No space .*kept in {out}.refining"
        with pytest.raises(BiasCompensationError, match=said):
            CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert len(steps) == 24 and [path.name for path in tmp_path.iterdir()] == ["out.refining"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert "Refined by model in 24 steps" in result.stdout
    assert len(steps) == 24 and [path.name for path in tmp_path.iterdir()] == ["out"]
    bc_plugin.disable()


@pytest.mark.parametrize("by", ["model", "block"])
def test_folders_the_wrong_way_round_are_told_before_anything_runs(folder, tmp_path, by):
    arguments = command(folder, tmp_path / "out", by)
    arguments[1:3] = arguments[2], arguments[1]
    for compensated in (arguments[1], str(folder / "compensated")):  # and now as both
        arguments[1] = compensated
        with pytest.raises(BiasCompensationError, match=r"FLOAT .* is quantized .* in the order"):
            CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert not list(tmp_path.iterdir())
    bc_plugin.disable()
