"""A checkpoint's own files with vectors beside them."""

import json

import pytest
import torch
from helpers.language import tiny_model
from helpers.vectors import pair
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bc_plugin import Compensation
from bc_plugin.names import SUFFIX
from bc_plugin.toolkits.copy import VECTORS, copy_compensated


@pytest.fixture(scope="module")
def compensated():
    return pair()


def _weights(folder):
    found = {}
    for file in folder.glob("model*.safetensors"):
        found |= load_file(file)
    return {name: tensor for name, tensor in found.items() if not name.endswith(SUFFIX)}


def _copied(source, out, compensation, model):
    out.mkdir()
    copy_compensated(source, out, compensation, model)
    assert Compensation.load(out).entry() == compensation.entry() | Compensation.load(out).entry()
    assert AutoModelForCausalLM.from_pretrained(out)
    return _weights(out)


def _same(first, second):
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name])
        for name in first
    )


def test_of_one_file_stays_one(tmp_path, compensated):
    model, compensation = compensated
    model.save_pretrained(tmp_path / "in")
    before = _weights(tmp_path / "in") | {"steps": torch.tensor(3), "mask": torch.ones(3).bool()}
    save_file(before, tmp_path / "in" / "model.safetensors", {"format": "pt", "more": "kept"})
    assert _same(_copied(tmp_path / "in", tmp_path / "out", compensation, model), before)
    assert len(list((tmp_path / "out").glob("*.safetensors*"))) == 1
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "more": "kept"}


def test_shards_are_copies_of_their_own(tmp_path, compensated):
    model, compensation = compensated
    model.save_pretrained(tmp_path / "in", max_shard_size="20KB")
    shards = sorted((tmp_path / "in").glob("*.safetensors"))
    assert len(shards) > 2
    before = [file.read_bytes() for file in shards]
    _copied(tmp_path / "in", tmp_path / "out", compensation, model)
    for file, content in zip(shards, before, strict=True):
        copied = tmp_path / "out" / file.name
        assert copied.read_bytes() == content
        copied.write_bytes(b"written over in place")
        assert file.read_bytes() == content
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    places = {name: place for name, place in index["weight_map"].items() if SUFFIX in name}
    assert set(places) == {name + SUFFIX for name in compensation.vectors}
    assert set(places.values()) == {VECTORS}


@pytest.mark.parametrize("shards", ["5GB", "20KB"])
def test_vectors_are_replaced_by_others(tmp_path, compensated, shards):
    model, compensation = compensated
    model.save_pretrained(tmp_path / "in", max_shard_size=shards)
    before = _copied(tmp_path / "in", tmp_path / "first", compensation, model)
    vectors = {name: vector + 1 for name, vector in compensation.vectors.items()}
    other = compensation.replaced(vectors=vectors)
    assert _same(_copied(tmp_path / "first", tmp_path / "second", other, model), before)
    found = Compensation.load(tmp_path / "second").vectors
    assert all(torch.equal(found[name], vector) for name, vector in vectors.items())


def test_only_what_was_fitted_is_another_one(tmp_path):
    model, compensation = pair()
    model.save_pretrained(tmp_path / "in")
    before, changed = _weights(tmp_path / "in"), "model.layers.1.input_layernorm.weight"
    with torch.no_grad():
        model.get_parameter(changed).mul_(2)
    fitted = compensation.replaced(scales=True)
    (tmp_path / "out").mkdir()
    copy_compensated(tmp_path / "in", tmp_path / "out", fitted, model)
    assert _same(_weights(tmp_path / "out"), before | {changed: 2 * before[changed]})


def test_pickled_weights_become_safetensors(tmp_path, compensated):
    model, compensation = compensated
    model.config.save_pretrained(tmp_path / "in")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.save(before, tmp_path / "in" / "pytorch_model.bin")
    assert _same(_copied(tmp_path / "in", tmp_path / "out", compensation, tiny_model()), before)
