"""A full disk loses nothing of a refinement."""

import errno
import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from helpers.killed import in_a_new_process
from helpers.refinement import compensated, refine

from bc_plugin import BiasCompensationError, Compensation
from bc_plugin.refinement import float_logits, progress

WRITERS = {
    "predictions": (float_logits, "save_file", 2),
    "the first state": (progress.torch, "save", 1),
    "a later state": (progress.torch, "save", 3),
}


@pytest.mark.parametrize("what", WRITERS)
def test_a_full_disk_loses_nothing(tmp_path, monkeypatch, what):
    model, quantized = compensated()
    expected = refine(compensated()[1], model)
    owner, name, last = WRITERS[what]
    write, calls = getattr(owner, name), []

    def full(*args, **kwargs):
        calls.append(args)
        if len(calls) >= last:
            Path(args[1]).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*args, **kwargs)

    before = Compensation.attached_to(quantized)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, full)
        with pytest.raises(BiasCompensationError, match=r"run.* cannot be written: .*No space"):
            refine(quantized, model, tmp_path / "run")
    assert Compensation.attached_to(quantized) is before
    assert not [path for path in (tmp_path / "run").rglob("*") if path.name.startswith(".")]
    found = refine(quantized, model, tmp_path / "run")
    assert all(torch.equal(found.vectors[name], v) for name, v in expected.vectors.items())


def _with_little_room(folder, size):
    """Exit with 0 if a file that does not fit is said not to."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # no room for progress bars either
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    model, quantized = compensated()
    try:
        refine(quantized, model, folder / "run", train="vectors")
    except BiasCompensationError as error:
        raise SystemExit("cannot be written" not in str(error)) from error
    raise SystemExit(2)


@pytest.mark.parametrize("size", [0, 100, 20_000])  # refinement.json, then predictions fail
def test_writers_of_their_own_that_find_no_room(tmp_path, size):
    assert in_a_new_process(_with_little_room, tmp_path, size) == 0
