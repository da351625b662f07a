import pytest
import torch
from helpers.language import ARCHITECTURES, crudely_quantized, tiny_model, token_batches
from transformers import AutoModelForCausalLM

import bc_plugin
from bc_plugin.models.blocks import find_blocks
from bc_plugin.models.float_blocks import BlockSnapshot


def _loaded(folder, architecture="llama", **kwargs):
    tiny_model(architecture).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs)


def _same_weights(snapshot, model, blocks):
    for name in blocks.names:
        with snapshot.load(name, torch.device("cpu")) as block:
            expected = model.get_submodule(name).state_dict()
            found = block.state_dict()
            assert list(found) == list(expected)
            assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_weights_from_a_folder_are_not_copied(tmp_path, architecture):
    model = _loaded(tmp_path, architecture)
    blocks = find_blocks(model)
    snapshot = BlockSnapshot(model, blocks)
    # Buffers that a checkpoint leaves out are copied; they are small.
    weights = {(n, key) for n in blocks.names for key in model.get_submodule(n).state_dict()}
    assert not weights & set(snapshot.copies)
    _same_weights(snapshot, model, blocks)


def test_weights_that_differ_from_the_folder_are_copied(tmp_path):
    model = _loaded(tmp_path)
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.data[0, 0] += 1
    blocks = find_blocks(model)
    snapshot = BlockSnapshot(model, blocks)
    assert list(snapshot.copies) == [("model.layers.1", "mlp.up_proj.weight")]
    _same_weights(snapshot, model, blocks)
    kept = weight.clone()
    weight.data.zero_()
    with snapshot.load("model.layers.1", torch.device("cpu")) as block:
        assert torch.equal(block.mlp.up_proj.weight, kept)


def test_another_type_than_the_folders_is_read_and_cast(tmp_path):
    model = _loaded(tmp_path, dtype=torch.bfloat16)
    blocks = find_blocks(model)
    snapshot = BlockSnapshot(model, blocks)
    assert not snapshot.copies
    _same_weights(snapshot, model, blocks)


def test_a_float_model_offloaded_to_disk_gives_the_same_vectors(tmp_path):
    model = _loaded(tmp_path / "float")
    quantized = crudely_quantized(model)
    expected = bc_plugin.compensate(quantized, model, token_batches())
    rest = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    placement = {"model.layers": "disk", **dict.fromkeys(rest, "cpu")}
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "float", device_map=placement, offload_folder=tmp_path / "offloaded"
    )
    assert offloaded.model.layers[0].mlp.up_proj.weight.is_meta
    found = bc_plugin.compensate(quantized, offloaded, token_batches())
    for name, vectors in expected.vectors.items():
        assert torch.equal(found.vectors[name], vectors)
