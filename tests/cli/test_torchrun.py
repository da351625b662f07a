"""``compensate`` and ``refine`` as torchrun starts them, and commands that work alone."""

import os
import shutil
import sys

import pytest
import torch
from helpers.checkpoints import LENGTH, write_inputs
from helpers.gguf_files import tiny, write_file
from helpers.ranks import as_launched

import bc_plugin
from bc_plugin import BiasCompensationError
from bc_plugin.cli import app, main
from bc_plugin.cli.ranks import _backend
from bc_plugin.cli.sites import load_compensation

DATA = ("--length", LENGTH, "--device-map", "cpu")
TEXT = ("--dataset", "{0}/text.txt", *DATA)
COMMANDS = {
    "compensate": ("compensate", "{0}/quantized", "{0}/float", "{1}", *TEXT),
    "few": ("compensate", "{0}/quantized", "{0}/float", "{1}", *TEXT, "--samples", 2),
    "self": (
        "compensate",
        "{0}/quantized",
        "{0}/float",
        "{1}",
        *DATA,
        "--dataset=self",
        "--samples=6",
    ),
    "a.gguf": ("compensate", "{0}/model.gguf", "{0}/blocks-of-32", "{1}", *TEXT),
    "refine": ("refine", "{0}/compensated", "{0}/float", "{1}", *TEXT, "--steps", 2),
    "by block": (
        "refine",
        "{0}/compensated",
        "{0}/float",
        "{1}",
        *TEXT,
        "--steps=2",
        "--by=block",
        "--train=vectors norms",
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder, 7)
    model = tiny()
    shutil.copytree(folder / "float", folder / "blocks-of-32")
    model.save_pretrained(folder / "blocks-of-32")
    write_file(folder / "model.gguf", model, "Q4_0")
    return folder


def _filled(words, *places):
    return [str(word).format(*places) for word in words]


def _run(rank, name, folder, out):
    """On a rank, with what it prints in a file."""
    with open(f"{out}.{rank}", "w") as sys.stdout:
        sys.argv = ["bc-plugin", *_filled(COMMANDS[name], folder, out / name)]
        main()


@pytest.mark.parametrize(
    ("name", "count"),
    [("compensate", 2), ("few", 3), ("self", 2), ("a.gguf", 2), ("refine", 3), ("by block", 2)],
)
def test_what_is_written_is_what_one_process_writes(folder, tmp_path, name, count):
    (tmp_path / "one").mkdir()
    (tmp_path / "all").mkdir()
    app(_filled(COMMANDS[name], folder, tmp_path / "one" / name), standalone_mode=False)
    bc_plugin.disable()
    assert as_launched(count, _run, name, folder, tmp_path / "all") == [0] * count
    assert [path.name for path in (tmp_path / "all").iterdir()] == [name]
    expected, found = (load_compensation(tmp_path / which / name) for which in ("one", "all"))
    assert found.vectors.keys() == expected.vectors.keys()
    for site, vectors in expected.vectors.items():
        torch.testing.assert_close(found.vectors[site], vectors, rtol=2e-3, atol=1e-4)
    said = [(tmp_path / f"all.{rank}").read_text() for rank in range(count)]
    assert "sites" in said[0] and not any(said[1:])


@pytest.mark.parametrize("command", ["quantize", "export", "evaluate", "inspect"])
def test_other_commands_work_in_one_process(monkeypatch, command):
    monkeypatch.setenv("WORLD_SIZE", "2")
    arguments = {"quantize": ["a", "b", "--dataset=c"], "export": ["a", "b"]}
    arguments |= {"evaluate": ["a", "--dataset=c"], "inspect": ["a"]}
    with pytest.raises(BiasCompensationError, match=f"`bc-plugin {command}` works in one process"):
        app([command, *arguments[command]], standalone_mode=False)


@pytest.mark.parametrize(
    ("device_map", "expected"),
    [("cpu", "RANK, .* not: start"), ("cuda:1", "its share of the GPUs")],
)
def test_ranks_that_cannot_start(monkeypatch, device_map, expected):
    monkeypatch.setenv("WORLD_SIZE", "2")
    if device_map != "cpu":
        for key in ("RANK", "LOCAL_RANK", "MASTER_PORT"):
            monkeypatch.setenv(key, "0")
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    arguments = ["compensate", "a", "b", "c", "--dataset=d", f"--device-map={device_map}"]
    with pytest.raises(BiasCompensationError, match=expected):
        app(arguments, standalone_mode=False)


@pytest.mark.parametrize(
    ("visible", "count", "ranks", "expected"),
    [("", 8, 2, "4,5,6,7"), ("3,5,7", 3, 2, "5,7"), ("", 3, 3, "1")],
)
def test_each_rank_sees_its_share_of_the_gpus(monkeypatch, visible, count, ranks, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert _backend("auto") == "nccl"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == expected
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(count + 1))
    with pytest.raises(BiasCompensationError, match="start at most one for each"):
        _backend("cuda")
