"""A run that is killed, whenever that is, goes on in a new process to the same vectors exactly."""

import pytest
import torch
from helpers.killed import KILLED, in_a_new_process, kill_at
from helpers.refinement import compensated, refine

from bc_plugin.refinement import float_logits, progress
from bc_plugin.refinement.progress import Progress, delete_progress
from bc_plugin.refinement.train import Training

# Of four batches, and a look at held-out data after every four steps of twelve, in each of three
# blocks: what is not called again before the process is killed, and the first step after that.
BY_MODEL = {
    "before anything is kept": ((progress, "_require_same_run"), 0),
    "in front of a batch's predictions": ((float_logits, "save_file", 2), 0),
    "between predictions and their place": ((float_logits, "save_file", 3, True), 0),
    "in the first step": ((Training, "_step"), 0),
    "some steps after a look": ((Training, "_step", 7), 4),
    "in front of a state": ((torch, "save", 2), 4),
    "between a state and its place": ((torch, "save", 2, True), 4),
    "once a state is in its place": ((Progress, "write", 2, True), 8),
    "after the last step": ((Training, "_step", 12, True), 8),
    "after training": ((Progress, "write", 3, True), None),
    "before the result is in place": ((torch, "save", 4), None),
    "with the result in place": ((torch, "save", 4, True), None),
    "while progress is deleted": ((progress.Path, "unlink", 10), 0),
}
BY_BLOCK = {
    "in the second block": ((Training, "_step", 19), 4),
    "between blocks": ((Progress, "write", 6, True), 0),
    "in the last block": ((Training, "_step", 36), 8),
    "after training": ((Progress, "write", 9, True), None),
    "before the result is in place": ((torch, "save", 10), None),
    "while progress is deleted": ((progress.Path, "unlink", 12, True), 0),
}
CASES = [
    pytest.param(by, name, id=f"{by}: {name}")
    for by, moments in (("model", BY_MODEL), ("block", BY_BLOCK))
    for name in moments
]


def refined(folder, by, moment=None):
    """Refine, keep the vectors and the number of the first step, and delete the progress."""
    step, made = Training._step, []

    def counted(self, number):
        made.append(number)
        return step(self, number)

    Training._step = counted
    if moment is not None:
        kill_at(*(BY_MODEL if by == "model" else BY_BLOCK)[moment][0])
    model, quantized = compensated()
    found = refine(quantized, model, folder / "run", by=by)
    torch.save([found.vectors, found.refined, made[:1]], folder / "result.pt")
    delete_progress(folder / "run")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    found = {}
    for by in ("model", "block"):
        folder = tmp_path_factory.mktemp(by)
        assert in_a_new_process(refined, folder, by) == 0
        found[by] = torch.load(folder / "result.pt")
        assert not (folder / "run").exists()
    return found


@pytest.mark.parametrize(("by", "moment"), CASES)
def test_it_goes_on_to_the_same_vectors(tmp_path, uninterrupted, by, moment):
    assert in_a_new_process(refined, tmp_path, by, moment) == KILLED
    assert in_a_new_process(refined, tmp_path, by) == 0
    vectors, refined_with, first = torch.load(tmp_path / "result.pt")
    expected = uninterrupted[by]
    assert vectors.keys() == expected[0].keys()
    assert all(torch.equal(vectors[name], v) for name, v in expected[0].items())
    assert refined_with == expected[1]
    step = (BY_MODEL if by == "model" else BY_BLOCK)[moment][1]
    assert first == ([] if step is None else [step])
    assert [path.name for path in tmp_path.iterdir()] == ["result.pt"]
