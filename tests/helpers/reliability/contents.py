"""Files that are cut short, or hold something else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from .cases import DAMAGED, Case
from .folders import CONFIG, INDEX, Folder


def _cut(share: float) -> Callable[[bytes], bytes]:
    return lambda data: data[: int(len(data) * share)]


def _header(change: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    """A safetensors file with another header of the same length."""

    def changed(data: bytes) -> bytes:
        end = 8 + int.from_bytes(data[:8], "little")
        header = changed_header = change(data[8:end])
        assert len(changed_header) <= end - 8
        return data[:8] + header.ljust(end - 8) + data[end:]

    return changed


def _offsets(header: bytes) -> bytes:
    """The first tensor's bytes begin elsewhere."""
    tensors = json.loads(header)
    first = next(name for name in tensors if name != "__metadata__")
    tensors[first]["data_offsets"][0] += 1
    return json.dumps(tensors, separators=(",", ":")).encode()


SAFETENSORS = {
    "empty": _cut(0),
    "4 bytes": lambda data: data[:4],
    "cut in its header": lambda data: data[:300],
    "cut at half": _cut(0.5),
    "without its last byte": lambda data: data[:-1],
    "a byte more": lambda data: data + b"\0",
    "a header of 2**60 bytes": lambda data: (1 << 60).to_bytes(8, "little") + data[8:],
    "a header of no bytes": lambda data: bytes(8) + data[8:],
    "a header that is no JSON": _header(lambda header: b"{" * len(header)),
    "a header that is no UTF-8": _header(lambda header: b"\xff" * len(header)),
    "a header that is a list": _header(lambda header: b"[]"),
    "a header without tensors": _header(lambda header: b"{}"),
    "a header with other offsets": _header(_offsets),
    "zeros": lambda data: bytes(len(data)),
    "text": lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
}
JSON = {
    "empty": _cut(0),
    "cut at a third": _cut(0.33),
    "without its last brace": lambda data: data.rstrip()[:-1],
    "no UTF-8": lambda data: data.replace(b"model", b"\xff\xfe", 1),
    "a list": lambda data: b"[]",
    "a text": lambda data: b'"x"',
    "null": lambda data: b"null",
    "zeros": lambda data: bytes(len(data)),
    "a page of HTML": lambda data: b"<html><body>404</body></html>",
}


def _bytes(family: str, what: str, name: str, change: Callable[[bytes], bytes], **how) -> Case:
    """A file of the folder with other bytes, in its first shard where it has those."""

    def run(folder: Folder) -> None:
        if name not in (path.name for path in folder.path.iterdir()):
            folder.shard()
        path = folder.path / name
        path.write_bytes(change(path.read_bytes()))

    return Case(family, f"{name}: {what}", run, DAMAGED, (name,), **how)


def _gone(name: str) -> Case:
    def run(folder: Folder) -> None:
        if name not in (path.name for path in folder.path.iterdir()):
            folder.shard()
        Path(folder.path / name).unlink()

    said = WHOLE if name == INDEX else name  # without an index that is what is looked for
    return Case("missing files", name, run, DAMAGED, (said,), anyone=True)


SHARD = "model-00002-of-00002.safetensors"
WHOLE = "model.safetensors"
# transformers reads these before this package does, so its own error will do.
CASES = [
    *(
        _bytes(f"bytes of {what}", how, name, change, anyone=True)
        for what, name in (("weights", WHOLE), ("a shard", SHARD))
        for how, change in SAFETENSORS.items()
    ),
    *(
        _bytes(f"bytes of {name}", how, name, change, anyone=True)
        for name in (CONFIG, INDEX)
        for how, change in JSON.items()
    ),
    *(_gone(name) for name in (WHOLE, SHARD, INDEX, CONFIG)),
]
APART = [
    _bytes("bytes of vectors", how, "bias_compensation.safetensors", change)
    for how, change in SAFETENSORS.items()
]
