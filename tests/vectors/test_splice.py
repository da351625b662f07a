"""Safetensors files that are read and written tensor by tensor."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bc_plugin import BiasCompensationError
from bc_plugin.files import new_folder
from bc_plugin.vectors.fingerprint import PART, fingerprint
from bc_plugin.vectors.lazy import LazyTensor, Stored, tensors_in
from bc_plugin.vectors.splice import write_tensors

TYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn)
TYPES += (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool)


def _tensors():
    torch.manual_seed(0)
    found = {str(dtype): torch.randint(2, 100, (3, 5)).to(dtype) for dtype in TYPES}
    found["ein Ohm, Ω"] = torch.tensor(2.5)
    found["none"] = torch.empty(0, 4)
    found["transposed"] = torch.randn(4, 3).T
    found["large"] = torch.randn(PART // 4 + 3)
    return found


def _same(first, second):
    def told(tensor):
        return tensor.dtype, tensor.shape, tensor.contiguous().view(-1).view(torch.uint8).tolist()

    return {n: told(t) for n, t in first.items()} == {n: told(t) for n, t in second.items()}


@pytest.fixture
def source(tmp_path):
    tensors = {name: tensor.contiguous() for name, tensor in _tensors().items()}
    save_file(tensors, tmp_path / "source.safetensors", metadata={"format": "pt"})
    return tmp_path / "source.safetensors"


@pytest.mark.parametrize("stored", [True, False])
def test_what_is_written_is_what_was_given(tmp_path, source, stored):
    given = tensors_in(source, vectors=False)
    if not stored:
        given = {name: LazyTensor.of(tensor) for name, tensor in _tensors().items()}
    file = tmp_path / "file.safetensors"
    write_tensors(file, given, {"format": "pt", "more": "kept"})
    assert _same(load_file(file), _tensors())
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt", "more": "kept"}
    for name, tensor in tensors_in(file, vectors=False).items():
        assert tensor.stored.start % tensor.dtype.itemsize == 0, name


def test_of_one_type_it_is_the_file_that_safetensors_writes(tmp_path):
    tensors = {f"{n}": torch.randn(n, 3) for n in range(12)}
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    ours = {name: LazyTensor.of(tensor) for name, tensor in tensors.items()}
    write_tensors(tmp_path / "ours", ours, {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_what_is_stored_is_copied_without_being_read(tmp_path, source, monkeypatch):
    monkeypatch.setattr(Stored, "read", lambda *args: pytest.fail("it was read"))
    write_tensors(tmp_path / "file.safetensors", tensors_in(source, vectors=False), {})
    assert _same(load_file(tmp_path / "file.safetensors"), _tensors())


def test_what_is_read_is_what_safetensors_reads(source):
    found = tensors_in(source, vectors=False)
    assert _same({name: tensor.read() for name, tensor in found.items()}, load_file(source))
    for name, tensor in _tensors().items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert found[name].fingerprint() == fingerprint(tensor)


def test_a_default_device_makes_no_difference(tmp_path, source):
    """transformers sets one while it loads a model: that of tensors without values."""
    with torch.device("meta"):
        found = tensors_in(source, vectors=False)
        read = {name: tensor.read() for name, tensor in found.items()}
        prints = {name: tensor.fingerprint() for name, tensor in found.items()}
        write_tensors(tmp_path / "file.safetensors", found, {})
    assert _same(read, load_file(source))
    assert _same(load_file(tmp_path / "file.safetensors"), read)
    assert prints == {name: fingerprint(tensor) for name, tensor in read.items()}


def test_a_part_is_that_of_the_tensor(source):
    part = tensors_in(source, vectors=False)["transposed"].narrow(1, 1, 2)
    assert part.shape == (3, 2)
    assert torch.equal(part.read(), _tensors()["transposed"][:, 1:3])


def test_a_file_cut_short_meanwhile_is_named(tmp_path, source):
    given = tensors_in(source, vectors=False)
    os.truncate(source, source.stat().st_size - 1)
    for use in (
        lambda: write_tensors(tmp_path / "file", given, {}),
        lambda: [tensor.read() for tensor in given.values()],
        lambda: tensors_in(source, vectors=False),
    ):
        with pytest.raises(BiasCompensationError, match=r"source\.safetensors cannot be read"):
            use()


def test_what_is_announced_has_to_come(tmp_path):
    wrong = LazyTensor(torch.float32, torch.Size((2,)), lambda: torch.zeros(3))
    with pytest.raises(ValueError, match=r"it is torch\.float32 \(3,\), and was announced as"):
        write_tensors(tmp_path / "file", {"it": wrong}, {})


def test_a_disk_that_fills_up_leaves_nothing(tmp_path):
    """A real write that fails, by a limit of the process."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    large = {"large": LazyTensor.of(torch.zeros(10**6))}
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, before[1]))
        with (
            pytest.raises(BiasCompensationError, match="a disk is full"),
            new_folder(tmp_path / "out") as part,
        ):
            write_tensors(part / "model.safetensors", large, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


MEMORY = """
import sys
from functools import partial
from pathlib import Path
import torch
from bc_plugin.vectors.checkpoint import files_digest
from bc_plugin.vectors.lazy import LazyTensor, tensors_in
from bc_plugin.vectors.splice import write_tensors

def most():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) // 1024

first, second = Path(sys.argv[1], "first.safetensors"), Path(sys.argv[1], "second.safetensors")
one = torch.Size((1 << 20,))
made = {str(n): LazyTensor(torch.float32, one, partial(torch.full, one, float(n)))
        for n in range(75)}
write_tensors(first, dict(list(made.items())[:2]), {})
files_digest([first])
before = most()
write_tensors(first, made, {})
write_tensors(second, tensors_in(first, vectors=False), {})
assert files_digest([first]) == files_digest([second])
print(first.stat().st_size >> 20, most() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc tells the memory")
def test_memory_is_that_of_a_tensor(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    size, grown = map(int, done.stdout.split())
    assert size == 300
    assert grown < 60  # memory-mapped, or read as a whole, it would be 300
