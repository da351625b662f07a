"""Files and folders are written whole or not at all."""

import errno
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from bc_plugin import BiasCompensationError
from bc_plugin.files import new_files, new_folder, written_whole


@pytest.fixture(params=[0o022, 0o027, 0o077])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def _mode(path):
    return path.stat().st_mode & 0o777


def test_modes_follow_the_umask(tmp_path, umask):
    tensors = {"weight": torch.zeros(2)}
    with new_folder(tmp_path / "out") as part:
        save_file(tensors, part / "weights.safetensors")  # its own mode is 0600
        (part / "config.json").write_text("{}")
    with written_whole(tmp_path / "vectors.safetensors") as part:
        save_file(tensors, part)
    assert _mode(tmp_path / "out") == 0o777 & ~umask
    for file in (*(tmp_path / "out").iterdir(), tmp_path / "vectors.safetensors"):
        assert _mode(file) == 0o666 & ~umask, file


def test_a_file_elsewhere_keeps_its_mode(tmp_path):
    for name in ("linked", "pointed"):
        (tmp_path / name).touch(0o600)
    with new_folder(tmp_path / "out") as part:
        os.link(tmp_path / "linked", part / "linked")
        (part / "pointed").symlink_to(tmp_path / "pointed")
    assert {_mode(tmp_path / name) for name in ("linked", "pointed")} == {0o600}


@pytest.mark.parametrize("make", [os.mkdir, lambda p: p.touch(), lambda p: p.symlink_to("none")])
def test_what_exists_is_left_alone(tmp_path, make):
    make(tmp_path / "out")
    with pytest.raises(BiasCompensationError, match="exists already"), new_folder(tmp_path / "out"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("make", [os.mkdir, lambda p: p.touch(), lambda p: p.symlink_to("none")])
def test_what_appears_meanwhile_is_left_and_the_work_kept(tmp_path, make):
    (tmp_path / "out.1").touch()
    expected = f"meanwhile.* in {tmp_path / 'out.2'}: rename"
    with pytest.raises(BiasCompensationError, match=expected), new_folder(tmp_path / "out") as part:
        (part / "file").write_text("computed")
        make(tmp_path / "out")
    assert (tmp_path / "out.2" / "file").read_text() == "computed"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.1", "out.2"]


def test_nothing_is_left_of_what_failed(tmp_path):
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "out") as part:
        (part / "file").touch()
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), written_whole(tmp_path / "file") as part:
        part.touch()
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        RuntimeError("I/O error: No space left on device (os error 28)"),  # as safetensors says it
    ],
)
def test_a_full_disk_is_named(tmp_path, error):
    expected = f"out was not written, as a disk is full.* room in {tmp_path}"
    with pytest.raises(BiasCompensationError, match=expected), new_folder(tmp_path / "out"):
        raise error
    assert list(tmp_path.iterdir()) == []


def test_a_limit_that_files_have_is_named(tmp_path):
    """A real write that fails, by a limit of the process."""
    program = f"""
import pathlib, resource, bc_plugin.files
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
with bc_plugin.files.new_folder(pathlib.Path({str(tmp_path / "out")!r})) as part:
    (part / "file").write_bytes(bytes(99999))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "BiasCompensationError" in done.stderr and "disk is full" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_other_errors_are_as_they_were(tmp_path):
    own = BiasCompensationError("No space left on device; the same call goes on from there.")
    with pytest.raises(BiasCompensationError) as found, new_folder(tmp_path / "out"):
        raise own
    assert found.value is own
    with pytest.raises(FileNotFoundError), new_folder(tmp_path / "out"):
        raise FileNotFoundError


@pytest.mark.parametrize("parent", ["file", "file/in it", "/proc/none"])
def test_where_nothing_can_be_made(tmp_path, parent):
    (tmp_path / "file").touch()
    out = tmp_path / parent / "out"
    with pytest.raises(BiasCompensationError, match="out cannot be made"), new_folder(out):
        pass


KILLED = """
import os, pathlib, signal, sys, bc_plugin.files
with bc_plugin.files.new_folder(pathlib.Path(sys.argv[1])) as part:
    (part / "file").touch()
    print(part, flush=True)
    sys.stdin.read(1)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_run_leaves_is_removed_by_the_next(tmp_path):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", KILLED, str(tmp_path / "out")]
    (tmp_path / ".out.backup").mkdir()  # somebody else's
    (tmp_path / ".out.v2.0123abcd.part").mkdir()  # of another OUT, which is called out.v2
    with subprocess.Popen(command, **pipes) as process:
        part = process.stdout.readline().strip()
        with new_folder(tmp_path / "out") as mine:  # its owner lives
            assert os.path.isdir(part)
        process.communicate(" ")
    assert os.path.isdir(part), "nobody was there to remove it"
    mine.mkdir()
    with new_folder(tmp_path / "other"):
        assert os.path.isdir(part)
    (tmp_path / "out").rename(tmp_path / "first")
    with new_folder(tmp_path / "out"):
        assert not os.path.isdir(part) and not mine.exists()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [".out.backup", ".out.v2.0123abcd.part", "first", "other", "out"]


def test_files_take_their_places_together(tmp_path):
    with new_files(tmp_path / "out.gguf") as part:
        for name in ("out.gguf", "out.control.gguf"):
            (part / name).write_text(name)
        assert [path.name for path in tmp_path.iterdir()] == [part.name]
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "out.gguf": "out.gguf",
        "out.control.gguf": "out.control.gguf",
    }


def test_of_files_that_fail_nothing_is_left(tmp_path):
    with pytest.raises(ZeroDivisionError), new_files(tmp_path / "out.gguf") as part:
        (part / "out.gguf").touch()
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["out.gguf", "out.control.gguf"])
def test_a_file_that_appears_meanwhile_is_left_and_the_work_kept(tmp_path, name):
    out, kept = tmp_path / "out.gguf", tmp_path / "out.gguf.1"
    expected = f"{name} has come to exist meanwhile.* in {kept}: rename"
    with pytest.raises(BiasCompensationError, match=expected), new_files(out) as part:
        for each in ("out.gguf", "out.control.gguf"):
            (part / each).write_text("computed")
        (tmp_path / name).write_text("other")
    assert (tmp_path / name).read_text() == "other"
    assert {path.read_text() for path in kept.iterdir()} == {"computed"}
    assert {path.name for path in tmp_path.iterdir()} == {name, kept.name}
