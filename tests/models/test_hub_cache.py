"""Float blocks of a model that was loaded by its name on the hub."""

import pytest
from helpers.language import tiny_model
from transformers import AutoModelForCausalLM

from bc_plugin.models.blocks import find_blocks
from bc_plugin.models.float_blocks import BlockSnapshot

NAME = "someone/tiny"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The hub's cache, filled by hand with two revisions of a model; nothing is downloaded."""
    repository = tmp_path / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    for seed, revision in enumerate(("main", "other")):
        commit = str(seed) * 40
        tiny_model(seed=seed).save_pretrained(repository / "snapshots" / commit)
        (repository / "refs" / revision).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def _snapshot(model):
    return BlockSnapshot(model, find_blocks(model))


@pytest.mark.parametrize("revision", ["main", "other"])
def test_weights_in_the_cache_are_not_copied(cache, revision):
    model = AutoModelForCausalLM.from_pretrained(NAME, revision=revision, cache_dir=cache)
    snapshot = _snapshot(model)
    assert not snapshot.copies
    with snapshot.load("model.layers.0", model.device) as block:
        for name, tensor in model.model.layers[0].state_dict().items():
            assert tensor.equal(block.state_dict()[name])


def test_weights_that_are_not_those_in_the_cache_are_copied(cache):
    model = AutoModelForCausalLM.from_pretrained(NAME, cache_dir=cache)
    model.model.layers[1].mlp.up_proj.weight.data += 1
    assert [name for _, name in _snapshot(model).copies] == ["mlp.up_proj.weight"]


@pytest.mark.parametrize("name", ["/no/such/folder", "a/b/c", "../x", "nobody/unknown", ""])
def test_a_name_that_is_not_in_the_cache_means_copies(cache, name):
    model = tiny_model()
    model.config._name_or_path = name
    assert len(_snapshot(model).copies) == 3 * len(model.model.layers[0].state_dict())
