import torch
from helpers.language import tiny_model

from bc_plugin.engines.keep import _as_modules
from bc_plugin.engines.plain import read_tensors
from bc_plugin.vectors.weights import weights_of


def test_a_checkpoints_tensors_have_the_digests_of_its_model(tmp_path):
    model = tiny_model(num_hidden_layers=11)  # by their names, the tenth would be the third
    model.save_pretrained(tmp_path)
    tensors = read_tensors(tmp_path)
    assert weights_of(_as_modules(tensors), ["model.layers"]) == weights_of(model, ["model.layers"])
    with torch.no_grad():
        model.model.layers[10].input_layernorm.weight.mul_(2)
    assert weights_of(_as_modules(tensors), ["model.layers"]) != weights_of(model, ["model.layers"])
