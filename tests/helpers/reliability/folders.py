"""A copy of a subject's folder that may be damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from bc_plugin.names import KEY, SUFFIX
from bc_plugin.vectors.compensation import FILE

from .cases import Subject

WEIGHTS, CONFIG, INDEX = "model.safetensors", "config.json", "model.safetensors.index.json"


class Folder:
    """A copy of ``subject.folder``.

    Its vectors are among the weights, with their entry in ``config.json``, or in a file of their
    own, which has the entry too.
    """

    def __init__(self, subject: Subject, path: Path) -> None:
        self.subject, self.path = subject, path
        shutil.copytree(subject.folder, path)

    @property
    def file(self) -> Path:
        """The one that holds the vectors."""
        apart = self.path / FILE
        return apart if apart.is_file() else self.path / WEIGHTS

    @property
    def weights(self) -> Path:
        return self.path / WEIGHTS

    @property
    def config(self) -> Path:
        return self.path / CONFIG

    def other(self, which: str, name: str = WEIGHTS) -> Path:
        """A file of another folder of the subject's."""
        return self.subject.others[which] / name

    def vectors(self) -> list[str]:
        """The tensors' names."""
        with safe_open(self.file, "pt") as file:
            return sorted(key for key in file.keys() if key.endswith(SUFFIX))  # noqa: SIM118

    @contextmanager
    def tensors(self, path: Path | None = None) -> Iterator[dict[str, Tensor]]:
        """Those of a file, written back as they then are; without a path, of the vectors' file."""
        path = path or self.file
        metadata = metadata_of(path)
        tensors = load_file(path)
        yield tensors
        save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata=metadata)

    def change_entry(self, change: Callable[[dict[str, Any]], Any]) -> None:
        """Put what ``change`` returns in the entry's place; None takes it away."""
        if self.file.name == FILE:
            metadata, tensors = metadata_of(self.file), load_file(self.file)
            changed = change(json.loads(metadata.pop(KEY)))
            metadata |= {} if changed is None else {KEY: json.dumps(changed)}
            save_file(tensors, self.file, metadata=metadata)
            return
        config = json.loads(self.config.read_text())
        settings = config["quantization_config"]
        changed = change(settings.pop(KEY))
        settings |= {} if changed is None else {KEY: changed}
        self.config.write_text(json.dumps(config, indent=2))

    def shard(self, count: int = 2) -> list[Path]:
        """Write the weights in shards with an index, instead of in one file."""
        tensors, metadata = load_file(self.weights), metadata_of(self.weights)
        self.weights.unlink()
        names = sorted(tensors)
        parts = [names[i::count] for i in range(count)]
        paths = [self.path / f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        for path, part in zip(paths, parts, strict=True):
            save_file({name: tensors[name] for name in part}, path, metadata=metadata)
        where = {name: path.name for path, part in zip(paths, parts, strict=True) for name in part}
        index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}}
        (self.path / INDEX).write_text(json.dumps({**index, "weight_map": where}))
        return paths


def metadata_of(path: Path) -> dict[str, str]:
    """The text that a safetensors file carries."""
    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})
