"""What a run keeps on disk: whose it is, and what damage does to it."""

import errno
import json
import shutil

import pytest
import torch
from helpers.language import tiny_model, token_batches
from helpers.refinement import CALIBRATION, SETTINGS, compensated, refine
from safetensors.torch import load_file

import bc_plugin
from bc_plugin import BiasCompensationError, Compensation, FloatLogits, RefinementConfig
from bc_plugin.refinement import progress
from bc_plugin.refinement.progress import Progress, about_to_place, delete_progress, is_in_place
from bc_plugin.refinement.train import Training

STATE = {"done": 4, "best": 0.1, "now": {"layer": torch.arange(6.0)}, "optimizer": {"state": {}}}


def kept(folder):
    """A run's progress, as it is found in a new process."""
    return Progress(folder, {"steps": 8}, {"float model": "abc"})


@pytest.fixture
def folder(tmp_path):
    kept(tmp_path / "run").write("model", STATE)
    return tmp_path / "run"


def _same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return one == other


def damaged(content):
    """Bytes as a broken disk, a full one or somebody's editor leave them."""
    yield from (b"", b"\0" * len(content), b"[]", b"null", b'{"run": 1}', b"\xff\xfe", content * 2)
    yield from (content[:end] for end in range(1, len(content), max(1, len(content) // 40)))
    for place in range(0, len(content), max(1, len(content) // 400)):
        yield content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]


@pytest.mark.parametrize("name", ["refinement.json", "refinement-model.pt"])
def test_damage_is_named_or_changes_nothing(folder, name):
    path = folder / name
    whole, named = path.read_bytes(), 0
    for content in damaged(whole):
        path.write_bytes(content)
        try:
            found = kept(folder).read("model")
        except BiasCompensationError as error:
            assert str(path) in str(error) and "elete" in str(error), error
            named += 1
        else:
            assert _same(found, STATE)
    assert named > 100


def test_damaged_predictions_are_named_or_not_taken(tmp_path):
    model, batches = tiny_model(), token_batches(1, length=4)
    FloatLogits.record(model, batches, tmp_path, 2)
    path = tmp_path / "batch-0.safetensors"
    whole, outcomes = path.read_bytes(), set()
    for content in damaged(whole):
        path.write_bytes(content)
        try:
            FloatLogits(tmp_path).check(batches, 2)
        except BiasCompensationError as error:
            assert str(tmp_path) in str(error), error
            outcomes.add("Delete it" in str(error))
    assert outcomes == {True, False}  # damaged, and recorded for something else
    path.write_bytes(whole[:-3])
    with pytest.raises(BiasCompensationError, match=r"batch-0.safetensors is damaged. Delete it"):
        FloatLogits.record(model, batches, tmp_path, 2)
    path.unlink()
    FloatLogits.record(model, batches, tmp_path, 2).check(batches, 2)


def test_another_version_says_so(folder):
    path = folder / "refinement.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "version": 1}))
    with pytest.raises(BiasCompensationError, match=r"refinement.json has version 1 .* delete"):
        kept(folder)


def test_a_missing_file_is_made_again_from_what_is_there(folder):
    (folder / "refinement.json").unlink()
    assert _same(kept(folder).read("model"), STATE)
    (folder / "refinement.json").unlink()
    with pytest.raises(BiasCompensationError, match=r"refinement-model.pt is not of this one"):
        Progress(folder, {"steps": 9}, {"float model": "abc"}).read("model")
    (folder / "refinement-model.pt").unlink()
    assert kept(folder).read("model") is None


def test_what_cannot_be_read_is_named(folder, monkeypatch):
    def out_of_reach(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(progress.torch, "load", out_of_reach)
    with pytest.raises(BiasCompensationError, match=r"refinement-model.pt cannot be read.*denied"):
        kept(folder).read("model")


# Whose it is


def stopped(folder, float_model, quantized, calibration=CALIBRATION, **settings):
    """Have a run stop after its first look."""

    def stop(self, number):
        if number == SETTINGS["evaluate_every"]:
            raise KeyboardInterrupt
        return step(self, number)

    step = Training._step
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Training, "_step", stop)
        config = RefinementConfig(**{**SETTINGS, **settings})
        bc_plugin.refine(quantized, float_model, calibration, config, folder=folder)


def _masked(batches):
    found = [{**b, "attention_mask": b["attention_mask"].clone()} for b in batches]
    for batch in found:
        batch["attention_mask"][:, -4:] = 0
    return found


def _placed(batches):
    return [{**b, "position_ids": torch.arange(16)[None] + 3} for b in batches]


def _nudged(model):
    """Another model by one weight in the last place."""
    with torch.no_grad():
        model.lm_head.weight[-1, -1] *= 1 + 1e-6
    return model


OTHERS = {
    "the float model differs": ({"float_model": lambda: _nudged(tiny_model())}, {}),
    "the calibration data differs": ({"calibration": lambda: token_batches(64, seed=3)}, {}),
    "calibration data differs": ({"calibration": lambda: _masked(CALIBRATION)}, {}),
    "data differs": ({"calibration": lambda: _placed(CALIBRATION)}, {}),
    "the vectors differ": ({"quantized": lambda: compensated(sites=("linear",))[1]}, {}),
    "the weights around the quantized blocks differ": (
        {"quantized": lambda: _nudged(compensated()[1])},
        {},
    ),
    "learning_rate was 0.02 and is 0.03": ({}, {"learning_rate": 0.03}),
    "steps was 12 and is 16": ({}, {"steps": 16}),
    "seed was 0 and is 1": ({}, {"seed": 1}),
    "mixed_precision was 'no' and is 'bf16'": ({}, {"mixed_precision": "bf16"}),
}


@pytest.fixture(scope="module", params=["model", "block"])
def a_stopped_run(request, tmp_path_factory):
    """By what, and its folder; the models are made anew for each test."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    stopped(folder, *compensated(), by=request.param)
    return request.param, folder


@pytest.mark.parametrize("difference", OTHERS)
def test_a_run_with_something_else_says_what_differs(tmp_path, a_stopped_run, difference):
    by, folder = a_stopped_run
    shutil.copytree(folder, tmp_path / "run")
    others, settings = OTHERS[difference]
    model, quantized = compensated()
    given = {"quantized": quantized, "float_model": model, "calibration": CALIBRATION}
    given |= {name: make() for name, make in others.items()}
    config = RefinementConfig(**{**SETTINGS, "by": by, **settings})
    with pytest.raises(BiasCompensationError, match=f"another refinement .*{difference}"):
        bc_plugin.refine(*given.values(), config, folder=tmp_path / "run")
    before = Compensation.attached_to(quantized)
    assert refine(quantized, model, tmp_path / "run", by=by) is not before  # nothing is lost


@pytest.mark.parametrize("change", ["model", "data", "masks"])
def test_predictions_of_something_else_are_not_taken(tmp_path, change):
    model, quantized = compensated()
    other, data = tiny_model(seed=5), token_batches(64, seed=3)
    config = RefinementConfig(**SETTINGS)
    given = {
        "model": (other, CALIBRATION),
        "data": (model, data),
        "masks": (model, _masked(CALIBRATION)),
    }

    def record(float_model, calibration, name):
        return bc_plugin.record_float_logits(
            float_model, calibration, config, folder=tmp_path / name
        )

    record(*given[change], "one")
    predictions = record(model, CALIBRATION, "one")
    record(model, CALIBRATION, "clean")
    for path in (tmp_path / "clean").iterdir():
        assert _same(load_file(path), load_file(tmp_path / "one" / path.name))
    record(*given[change], "other")
    shutil.copy(tmp_path / "other" / "batch-1.safetensors", tmp_path / "one")
    with pytest.raises(BiasCompensationError, match="batch 1 of 4"):
        bc_plugin.refine(quantized, predictions, CALIBRATION, config)


# The result


def test_a_result_is_known_by_its_vectors(tmp_path):
    vectors = {"layer": torch.arange(6.0), "other": torch.ones(2)}
    assert not is_in_place(tmp_path, vectors)
    about_to_place(tmp_path, vectors)
    assert is_in_place(tmp_path, dict(reversed(vectors.items())))
    assert not is_in_place(tmp_path, {**vectors, "layer": torch.zeros(6)})
    delete_progress(tmp_path)
    assert not tmp_path.exists()
