"""The stream is the float model's: what happens between blocks, and what blocks hand on."""

import copy

import pytest
import torch
from helpers.deepstack import TEXT, filled, with_deepstack, with_images
from helpers.images import mean_shifts
from helpers.language import VOCABULARY, crudely_quantized, tiny_model, token_batches
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertModel,
    AutoConfig,
    AutoModelForCausalLM,
)

import bc_plugin
from bc_plugin import BiasCompensationError, RefinementConfig
from bc_plugin.models.blocks import find_blocks
from bc_plugin.models.float_blocks import BlockSnapshot
from bc_plugin.models.record import record_calls

EXACT = {"positions": 0, "dtype": "float64", "held_out": 0, "batch_tokens": 1}
# The last two layers take keys and values from those before them.
SHARED = {
    "num_hidden_layers": 5,
    "num_kv_shared_layers": 2,
    "layer_types": [
        f"{kind}_attention" for kind in ("sliding", "full", "sliding", "sliding", "full")
    ],
    "sliding_window": 8,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
}


def sharing_caches():
    config = AutoConfig.for_model("gemma4_text", **{**TEXT, **SHARED}, global_head_dim=8)
    return filled(AutoModelForCausalLM.from_config(config))


class Between(nn.Module):
    """Blocks with something done in front of the second, whatever ``between`` is."""

    def __init__(self, between, count=3):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(count)
        )
        self.between = between

    def forward(self, hidden_states):
        given = hidden_states
        for number, layer in enumerate(self.layers):
            if number == 1:
                hidden_states = self.between(hidden_states, given)
            hidden_states = layer(hidden_states)
        return hidden_states


def between(what):
    torch.manual_seed(0)
    model = Between(what).double().eval()
    return model, [torch.randn(2, 5, 8).double() for _ in range(3)]


def check_linears(model, batches, float_model=None, **config):
    quantized = crudely_quantized(model)
    if isinstance(float_model, BlockSnapshot):  # toolkits leave alone what is outside of the blocks
        quantized.model.per_layer_model_projection = model.model.per_layer_model_projection
    compensation = bc_plugin.compensate(
        quantized, float_model or model, batches, {**EXACT, **config}
    )
    linears = [n for n, kind in compensation.kinds.items() if kind == "linear"]
    assert linears
    batches = [b if isinstance(b, dict) else {"hidden_states": b} for b in batches]
    for name, shift in mean_shifts(model, quantized, linears, batches).items():
        torch.testing.assert_close(
            compensation.vectors[name][0], shift, rtol=1e-8, atol=1e-10, msg=name
        )
    return compensation


def test_what_is_added_between_blocks_is_part_of_the_stream():
    check_linears(*between(lambda hidden, given: hidden + given))


def test_images_that_are_added_between_blocks_are_part_of_the_stream():
    check_linears(with_deepstack(), with_images(), blocks="model.language_model.layers")


def test_nothing_is_kept_where_nothing_is_added():
    model = tiny_model()
    for calls in record_calls(model, find_blocks(model), token_batches(2), torch.device("cpu")):
        assert [call.added for call in calls.calls] == [None] * 3


@pytest.mark.parametrize(
    "what",
    [
        lambda hidden, given: 2 * hidden,
        lambda hidden, given: hidden.roll(1, -2),
        lambda hidden, given: hidden.tanh() + given,
        lambda hidden, given: hidden + torch.randn_like(hidden),
    ],
)
def test_whatever_else_happens_between_blocks_is_refused(what):
    model, batches = between(what)
    with pytest.raises(BiasCompensationError, match="do not give what they give within the model"):
        bc_plugin.compensate(crudely_quantized(model), model, batches, EXACT)


def test_hidden_states_that_are_reshaped_between_blocks_are_refused():
    model, batches = between(lambda hidden, given: hidden.flatten(0, 1))
    with pytest.raises(BiasCompensationError, match=r"reshapes hidden states.*'layers\.1'"):
        bc_plugin.compensate(crudely_quantized(model), model, batches, EXACT)


def test_blocks_in_another_order_are_refused():
    model, batches = between(lambda hidden, given: hidden)
    model.forward = lambda hidden_states: model.layers[2](
        model.layers[1](model.layers[0](hidden_states))
    )
    check_linears(model, batches)
    model.forward = lambda hidden_states: model.layers[2](
        model.layers[0](model.layers[1](hidden_states))
    )
    with pytest.raises(BiasCompensationError, match=r"'layers\.1' where 'layers\.0' is next"):
        bc_plugin.compensate(crudely_quantized(model), model, batches, EXACT)


def test_blocks_that_share_their_weights_are_refused():
    config = AlbertConfig(
        vocab_size=VOCABULARY,
        embedding_size=16,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
    )
    model = filled(AlbertModel(config))
    with pytest.raises(BiasCompensationError, match=r"groups\.0' 6 times .*ALBERT"):
        bc_plugin.compensate(crudely_quantized(model), model, token_batches(), EXACT)


def test_blocks_that_are_never_reached_are_refused():
    model, batches = between(lambda hidden, given: hidden)
    model.forward = lambda hidden_states: model.layers[1](model.layers[0](hidden_states))
    with pytest.raises(BiasCompensationError, match=r"never reaches the block 'layers\.2'"):
        bc_plugin.compensate(crudely_quantized(model), model, batches, EXACT)


def test_keys_and_values_that_layers_share_are_the_float_models():
    model = sharing_caches()
    of_model = check_linears(model, token_batches(3))
    snapshot = BlockSnapshot(model, find_blocks(model))
    of_snapshot = check_linears(model, token_batches(3), snapshot)
    for name, vectors in of_model.vectors.items():
        torch.testing.assert_close(of_snapshot.vectors[name], vectors, msg=name)


def test_a_quantized_block_leaves_the_float_models_keys_and_values():
    """Of all sites, blocks included: fed by the float model, none has a mean shift left."""
    model = sharing_caches()
    compensated = crudely_quantized(model)
    compensation = bc_plugin.compensate(compensated, model, token_batches(3), EXACT)
    compensation.attach(compensated)
    blocks = find_blocks(model)
    shifts = {name: [] for name in blocks.names}
    given = {}

    def watch(name):
        def before(module, args, kwargs):
            given[name] = copy.deepcopy((args, kwargs))

        def after(module, args, output):
            args, kwargs = given.pop(name)
            shifts[name].append(output - compensated.get_submodule(name)(*args, **kwargs))

        model.get_submodule(name).register_forward_pre_hook(before, with_kwargs=True)
        model.get_submodule(name).register_forward_hook(after)

    for name in blocks.names:
        watch(name)
    with torch.no_grad():
        for batch in token_batches(3):
            model(**batch)
    for name, found in shifts.items():
        left = torch.cat(found, 1).mean((0, 1)).norm() / compensation.vectors[name][0].norm()
        assert left < 1e-8, name


def test_vectors_are_refined_by_block_where_layers_share_keys_and_values():
    model = sharing_caches().float()
    quantized = crudely_quantized(model)
    compensation = bc_plugin.compensate(quantized, model, token_batches(4), {"positions": 0})
    compensation.attach(quantized)
    refined = bc_plugin.refine(
        quantized, model, token_batches(4), RefinementConfig(steps=2, by="block")
    )
    assert set(refined.vectors) == set(compensation.vectors)
