"""Linears that are more, or less, than a matrix and a bias."""

import pytest
import torch
from helpers.language import VOCABULARY, crudely_quantized, token_batches
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import bc_plugin
from bc_plugin import BiasCompensationError
from bc_plugin.models.mixers import convolved_linears

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
OWN = {
    "llama4_text": {**EXPERTS, "head_dim": 8, "intermediate_size_mlp": 48},
    "phimoe": EXPERTS,
    "mamba": {"state_size": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8},
    "qwen3_next": {
        **{"head_dim": 8, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
        **{"linear_num_key_heads": 2, "linear_num_value_heads": 4},
        **{"num_experts": 0, "mlp_only_layers": [0, 1, 2, 3]},
    },
    "openai-gpt": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "zamba2": {
        **{"layers_block_type": ["linear_attention", "hybrid"] * 2, "mamba_d_state": 8},
        **{"n_mamba_heads": 8, "num_key_value_heads": 4, "adapter_rank": 4},
    },
}


def tiny(architecture):
    torch.manual_seed(0)
    sizes = {} if architecture == "openai-gpt" else SIZES
    names = {"vocab_size": VOCABULARY, "pad_token_id": 0}
    config = AutoConfig.for_model(architecture, **{**names, **sizes, **OWN[architecture]})
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" not in name and parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    return model


def compensated(architecture, **config):
    model = tiny(architecture)
    quantized = crudely_quantized(model)
    compensation = bc_plugin.compensate(quantized, model, token_batches(), config)
    return quantized, compensation


@pytest.mark.parametrize("architecture", ["llama4_text", "phimoe"])
def test_a_router_that_is_a_linear_is_left_to_its_block(architecture, capsys):
    quantized, compensation = compensated(architecture)
    routers = [n for n, m in quantized.named_modules() if n.endswith("router")]
    assert routers and all(isinstance(quantized.get_submodule(n), nn.Linear) for n in routers)
    assert not set(routers) & set(compensation.vectors)
    assert {"model.layers.0", "model.layers.0.self_attn.q_proj"} <= set(compensation.vectors)
    assert f"{routers[0]}: left to its block" in capsys.readouterr().out


def test_a_linear_that_is_never_called_is_left_to_its_block(capsys):
    """Mamba multiplies with the weight of ``dt_proj`` itself."""
    _, compensation = compensated("mamba")
    assert "backbone.layers.0" in compensation.vectors
    assert not any("dt_proj" in name for name in compensation.vectors)


def test_a_linear_that_is_never_called_is_refused_where_no_block_stands_for_it():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.called, self.read = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, hidden_states):
            return self.called(hidden_states) @ self.read.weight

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Block() for _ in range(2))

        def forward(self, hidden_states):
            for layer in self.layers:
                hidden_states = layer(hidden_states)
            return hidden_states

    torch.manual_seed(0)
    model = Model()
    batches = [torch.randn(2, 5, 8) for _ in range(3)]
    compensation = bc_plugin.compensate(crudely_quantized(model), model, batches)
    assert set(compensation.vectors) == {
        *("layers.0", "layers.0.called", "layers.1", "layers.1.called")
    }
    with pytest.raises(BiasCompensationError, match=r"layers\.0\.read.*Add 'block' to the sites"):
        bc_plugin.compensate(crudely_quantized(model), model, batches, {"sites": "linear"})


@pytest.mark.parametrize("positions", [0, 1])
@pytest.mark.parametrize("architecture", ["mamba", "qwen3_next", "jamba", "zamba2"])
def test_padding_does_not_get_into_a_state(architecture, positions):
    quantized, compensation = compensated(architecture, positions=positions)
    for vectors in compensation.vectors.values():
        vectors += 0.5 * torch.randn(vectors.shape).to(vectors)
    compensation.attach_unchecked(quantized)
    ids = token_batches(1, length=9)[0]["input_ids"]
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), ids], 1)
    with torch.no_grad():
        alone = quantized(ids, attention_mask=torch.ones_like(ids)).logits
        within = quantized(padded, attention_mask=(padded != 0).long()).logits[:, 3:]
    torch.testing.assert_close(within, alone, rtol=1e-4, atol=1e-4)


def test_only_linears_beside_a_convolution_along_the_sequence_have_no_vectors():
    block = tiny("qwen3_next").model.layers[0]
    assert convolved_linears(block) == {
        f"linear_attn.{name}" for name in ("in_proj_qkvz", "in_proj_ba", "out_proj")
    }
    _, compensation = compensated("qwen3_next")
    assert "model.layers.0.mlp.up_proj" in compensation.vectors
    assert not any("linear_attn." in name for name in compensation.vectors)
    with pytest.raises(BiasCompensationError, match="Add 'block' to the sites"):
        compensated("mamba", sites="linear")


def test_blocks_that_return_lists():
    _, compensation = compensated("openai-gpt")
    assert {f"transformer.h.{i}" for i in range(3)} <= set(compensation.vectors)


@pytest.mark.parametrize("architecture", ["jamba", "zamba2"])
def test_lists_of_several_kinds_of_blocks(architecture):
    _, compensation = compensated(architecture)
    assert list(compensation.blocks) == ["model.layers"]
    assert {f"model.layers.{i}" for i in range(4)} <= set(compensation.vectors)
