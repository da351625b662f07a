"""What is told of a config is what models of it have, hold and compute."""

import pytest
import torch
from helpers.language import ARCHITECTURES, VOCABULARY, tiny_model, token_batches
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from bc_plugin import BiasCompensationError
from bc_plugin.costs.refining import kept_activations
from bc_plugin.costs.shapes import shapes_of
from bc_plugin.costs.stored import float_model
from bc_plugin.costs.work import model_forward

EXPERTS = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}


def _shapes(model, folder):
    model.config.save_pretrained(folder)
    return shapes_of(folder)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sizes(architecture, tmp_path):
    model = tiny_model(architecture)
    stored = sum(parameter.nbytes for parameter in model.parameters())
    assert float_model(_shapes(model, tmp_path), 4) == stored


@pytest.mark.parametrize("architecture", EXPERTS)
def test_experts(architecture, tmp_path):
    config = AutoConfig.for_model(
        architecture,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        **EXPERTS[architecture],
    )
    config.save_pretrained(tmp_path)
    found = shapes_of(tmp_path).blocks[0].linears
    experts = [linear for linear in found if linear.share < 1]
    assert sum(linear.count for linear in experts) % 4 == 0 and experts
    assert all(linear.share == 0.5 and not linear.is_site for linear in experts)
    assert sum(linear.is_site for linear in found) >= 4


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_operations(architecture, tmp_path):
    if architecture == "bloom":
        pytest.skip("its attention scores are a product that the counter does not know")
    model = tiny_model(architecture, attn_implementation="eager")
    batch = token_batches(1, length=16, batch=2)[0]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**batch)
    expected = counter.get_total_flops()
    assert model_forward(_shapes(model, tmp_path), 32, 16) == pytest.approx(expected, rel=0.01)


def _kept(model, batch):
    """Bytes of the tensors that a forward pass keeps for the backward pass."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # alive, so that no other has its address
        return tensor

    hidden = model.get_input_embeddings()(batch["input_ids"]).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model.model(inputs_embeds=hidden, use_cache=False).last_hidden_state
    assert output.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "phi3"])
def test_what_is_kept_for_the_backward_pass(architecture, dtype, tmp_path):
    shape = {"hidden_size": 128, "intermediate_size": 352, "num_attention_heads": 4}
    model = tiny_model(architecture, **shape, num_hidden_layers=6).to(dtype).requires_grad_(False)
    shapes = _shapes(model, tmp_path)
    kept = _kept(model, token_batches(1, length=64, batch=2)[0])
    estimate = kept_activations(shapes, 128, dtype.itemsize, False)
    assert estimate == pytest.approx(kept, rel=0.25)


def test_a_config_that_is_no_language_model_is_refused(tmp_path):
    AutoConfig.for_model("vit").save_pretrained(tmp_path)
    with pytest.raises(BiasCompensationError, match="no causal language model of the config"):
        shapes_of(tmp_path)
