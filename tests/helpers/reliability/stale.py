"""Folders with files of several saves, and folders that only look odd."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from bc_plugin.vectors.compensation import FILE, Compensation

from .cases import DAMAGED, EITHER, HARMLESS, Case, Subject
from .folders import CONFIG, INDEX, WEIGHTS, Folder

EITHER_NAME = (f"{WEIGHTS}|{CONFIG}|{INDEX}|/checkpoint",)


def _bring(*files: str, which: str = "weights"):
    """Files of another checkpoint in place of the folder's own."""

    def run(folder: Folder) -> None:
        for name in files:
            shutil.copy2(folder.other(which, name), folder.path / name)

    return run


def _shards_of(which: str, index: bool):
    """Shards of an older save beside the file, with their index or without."""

    def run(folder: Folder) -> None:
        older = Folder(_subject(folder, which), folder.path.with_name("older"))
        for path in (*older.shard(), *([older.path / INDEX] if index else [])):
            shutil.copy2(path, folder.path / path.name)

    return run


def _subject(folder: Folder, which: str) -> Subject:
    subject = folder.subject
    return Subject(subject.others[which], subject.load, {}, subject.others)


def _file_beside_shards(which: str):
    """Saved in shards over a folder that has another save's single file."""

    def run(folder: Folder) -> None:
        folder.shard()
        shutil.copy2(folder.other(which), folder.weights)

    return run


def _one_shard_of(which: str):
    def run(folder: Folder) -> None:
        paths = folder.shard()
        older = Folder(_subject(folder, which), folder.path.with_name("older"))
        shutil.copy2(older.shard()[1], paths[1])

    return run


def _apart(which: str | None):
    """Vectors of their own file beside: this checkpoint's, or another's."""

    def run(folder: Folder) -> None:
        source = folder.subject.folder if which is None else folder.subject.others[which]
        Compensation.load(source).save(folder.path)

    return run


def _write(name: str, data: bytes):
    def run(folder: Folder) -> None:
        (folder.path / name).write_bytes(data)

    return run


def _saved(name: str, value):
    return lambda folder: torch.save(value, folder.path / name)


def _plain(then: Callable[[Folder], None]):
    """The checkpoint without vectors, and then."""

    def run(folder: Folder) -> None:
        vectors = folder.vectors()
        with folder.tensors() as tensors:
            for name in vectors:
                del tensors[name]
        folder.change_entry(lambda entry: None)
        then(folder)

    return run


def _plain_over_shards(folder: Folder) -> None:
    whole = load_file(folder.weights)
    folder.shard()
    save_file(whole, folder.weights, metadata={"format": "pt"})
    _plain(lambda folder: None)(folder)


def _moved(name: str):
    def run(folder: Folder) -> Path:
        path = folder.path.with_name(name)
        folder.path.rename(path)
        return path

    return run


def _linked(folder: Folder) -> Path:
    path = folder.path.with_name("link")
    path.symlink_to(folder.path, target_is_directory=True)
    return path


def _files_linked(folder: Folder) -> None:
    """As the hub's cache has them."""
    blobs = folder.path.with_name("blobs")
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.path.iterdir())):
        path.rename(blobs / f"{number}")
        path.symlink_to(os.path.relpath(blobs / f"{number}", folder.path))


def _read_only(folder: Folder) -> None:
    for path in (*folder.path.iterdir(), folder.path):
        path.chmod(0o555 if path.is_dir() else 0o444)


def _hidden(folder: Folder) -> None:
    (folder.path / "sub.safetensors").mkdir()
    shutil.copytree(folder.subject.others["weights"], folder.path / "older")


BROKEN = b"\x05\0\0\0\0\0\0\0{{{{{"
STALE = {
    "config.json of another calibration": (_bring(CONFIG), DAMAGED),
    "weights of another calibration": (_bring(WEIGHTS), DAMAGED),
    "config.json of another run's vectors": (_bring(CONFIG, which="vectors"), DAMAGED),
    "weights with another run's vectors": (_bring(WEIGHTS, which="vectors"), DAMAGED),
    "config.json of the float model": (_bring(CONFIG, which="float"), DAMAGED),
    "weights of the float model": (_bring(WEIGHTS, which="float"), DAMAGED),
    "weights of another model": (_bring(WEIGHTS, which="model"), DAMAGED),
    "an older file beside shards": (_file_beside_shards("weights"), EITHER),
    "a file with older vectors beside shards": (_file_beside_shards("vectors"), EITHER),
    "a shard of an older save": (_one_shard_of("weights"), DAMAGED),
    "a shard with older vectors": (_one_shard_of("vectors"), DAMAGED),
    "shards of an older save": (_shards_of("weights", False), HARMLESS),
    "shards and index of an older save": (_shards_of("weights", True), HARMLESS),
    "shards with older vectors": (_shards_of("vectors", True), HARMLESS),
    "an older file of vectors": (_apart("weights"), HARMLESS),
    "a file of another run's vectors": (_apart("vectors"), HARMLESS),
    "the same vectors in a file beside": (_apart(None), HARMLESS),
}
UNREAD = {
    "an unrelated broken safetensors file": _write("notes.safetensors", BROKEN),
    "an empty safetensors file": _write("adapter.safetensors", b""),
    "a broken file of vectors": _write(FILE, BROKEN),
    "an empty file of vectors": _write(FILE, b""),
    "training_args.bin": _saved("training_args.bin", {"a": torch.Size([3]), "b": {1, 2}}),
    "a broken .bin file": _write("optimizer.bin", b"\0\1\2"),
    "weights in PyTorch's format": _saved("pytorch_model.bin", {"a": torch.ones(2)}),
    "quantize_config.json that is broken": _write("quantize_config.json", b"{"),
    "quantize_config.json that is empty": _write("quantize_config.json", b"{}"),
    "generation_config.json is missing": lambda f: (f.path / "generation_config.json").unlink(),
    "folders in it": _hidden,
    "a hidden file": _write(".model.safetensors.part", BROKEN),
    "a broken README": _write("README.md", b"\xff\xfe"),
}
PATHS = {
    "[brackets]": _moved("out [1] [a-z]*"),
    "spaces": _moved("my model"),
    "unicode": _moved("modèle-模型-🤖"),
    "a dot in front": _moved(".hidden"),
    "percent and hash": _moved("50%#2?x=1"),
    "a name like a file's": _moved("model.safetensors"),
    "a link to the folder": _linked,
    "files that are links": _files_linked,
    "read-only": _read_only,
    "in two shards": lambda folder: folder.shard() and None,
    "in many shards": lambda folder: folder.shard(9) and None,
}
BESIDE_PLAIN = {
    "its own vectors": _apart(None),
    "another run's vectors": _apart("vectors"),
    "another calibration's vectors": _apart("weights"),
    "a broken file of vectors": _write(FILE, BROKEN),
    "training_args.bin": _saved("training_args.bin", {"a": {1}}),
    "an unrelated broken safetensors file": _write("notes.safetensors", BROKEN),
    "an older compensated checkpoint's shards": _shards_of("weights", False),
}
WITH_VECTORS = ("file of vectors", "vectors in a file beside", "file of another run's vectors")
CASES = [
    *(Case("stale files", k, run, right, EITHER_NAME) for k, (run, right) in STALE.items()),
    *(Case("files nobody reads", k, run, HARMLESS) for k, run in UNREAD.items()),
    *(Case("names and places", k, run, HARMLESS) for k, run in PATHS.items()),
    *(
        Case("beside a plain checkpoint", k, _plain(run), HARMLESS, expected="plain")
        for k, run in BESIDE_PLAIN.items()
    ),
    Case(
        "stale files",
        "a plain file over compensated shards",
        _plain_over_shards,
        HARMLESS,
        expected="plain",
    ),
]
