"""Refinement block by block of models that stay in their files."""

import copy

import pytest
import torch
from helpers.language import tiny_model
from helpers.packed import packed_checkpoint
from helpers.refinement import CALIBRATION, compensated, refine

import bc_plugin
from bc_plugin import BiasCompensationError, Compensation
from bc_plugin.models.modules import stored_tensors
from bc_plugin.models.offloaded import stored_value

pytest.importorskip("accelerate")

from bc_plugin.streaming.load import open_streamed

WIDE = {"intermediate_size": 64, "num_hidden_layers": 2, "num_key_value_heads": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A float model, one quantized to 2 bits, and vectors."""
    folder = tmp_path_factory.mktemp("refined")
    model = tiny_model(**WIDE)
    model.save_pretrained(folder / "float")
    packed_checkpoint(folder / "packed", copy.deepcopy(model), bits=2)
    names = folder / "packed", folder / "float"
    bc_plugin.compensate(*names, CALIBRATION, {"held_out": 0}).save(folder / "packed")
    return folder


def opened(folder):
    """The streamed models, the quantized one compensated."""
    quantized = open_streamed(folder / "packed")
    Compensation.load(folder / "packed").attach(quantized)
    return quantized, open_streamed(folder / "float")


def test_vectors_are_those_of_loaded_models(tmp_path):
    model, quantized = compensated()
    model.save_pretrained(tmp_path / "float")
    quantized.save_pretrained(tmp_path / "quantized")
    streamed = open_streamed(tmp_path / "quantized")
    Compensation.attached_to(quantized).attach(streamed)
    expected = refine(quantized, model, by="block")
    found = refine(streamed, open_streamed(tmp_path / "float"), by="block")
    assert found.refined == expected.refined and found.refined["after"] < found.refined["before"]
    assert all(torch.equal(found.vectors[name], v) for name, v in expected.vectors.items())


def test_nothing_of_the_blocks_stays_but_what_was_trained(folder):
    quantized, model = opened(folder)
    name = "model.layers.1.mlp.down_proj.scales"
    before = stored_value(quantized, name).clone()
    kinds = ("vectors", "scales", "norms")
    found = refine(quantized, model, by="block", train=kinds, norms_learning_rate=1e-2)
    assert found.refined["after"] < found.refined["before"] and found.scales
    for each in (quantized, model):
        inside = (t for n, t in stored_tensors(each) if "layers" in n and "bias_comp" not in n)
        assert all(tensor.is_meta for tensor in inside)
    assert not torch.equal(stored_value(quantized, name), before)


def test_it_goes_on_where_it_was(folder, tmp_path):
    quantized, model = opened(folder)
    once = refine(quantized, model, tmp_path, by="block")
    again = refine(*opened(folder), tmp_path, by="block")
    assert all(torch.equal(again.vectors[name], v) for name, v in once.vectors.items())


def test_another_float_model_is_told_by_its_embeddings(folder, tmp_path):
    torch.manual_seed(1)
    other = tiny_model(**WIDE)
    torch.nn.init.normal_(other.get_input_embeddings().weight)
    other.save_pretrained(tmp_path)
    with pytest.raises(BiasCompensationError, match="another model"):
        refine(opened(folder)[0], open_streamed(tmp_path), by="block")
