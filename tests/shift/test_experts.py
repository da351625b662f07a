"""Routed experts, be they modules or slices of one parameter, are left to their blocks."""

import copy

import pytest
import torch
from helpers.language import ROTARY, VOCABULARY, crudely_quantized, tiny_model, token_batches
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import bc_plugin
from bc_plugin import BiasCompensationError
from bc_plugin.models.blocks import find_blocks
from bc_plugin.toolkits.joint import JointGPTQ, centred_inputs


class Mixture(nn.Module):
    """Experts that are modules, one of them for every token, as transformers 4 had them."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.gate = nn.Linear(32, 3, bias=False)
        self.experts = nn.ModuleList(copy.deepcopy(mlp) for _ in range(3))
        self.shared_experts = mlp

    def forward(self, hidden):
        tokens = hidden.flatten(0, 1)
        chosen = self.gate(tokens).argmax(-1)
        output = self.shared_experts(tokens)
        for number, expert in enumerate(self.experts):
            output = output.index_add(
                0, (mine := (chosen == number).nonzero()[:, 0]), expert(tokens[mine])
            )
        return output.view(hidden.shape)


def _with_modules():
    model = tiny_model()
    for layer in model.model.layers:
        layer.mlp = Mixture(layer.mlp)
    return model


def _with_stacks():
    torch.manual_seed(0)
    settings = {**ROTARY, "num_local_experts": 4, "num_experts_per_tok": 2}
    config = AutoConfig.for_model("mixtral", vocab_size=VOCABULARY, **settings)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            nn.init.normal_(parameter, std=0.2)
    return model


@torch.no_grad()
def _rounded_stacks(model, step=0.05):
    quantized = copy.deepcopy(model)
    for parameter in quantized.parameters():
        if parameter.dim() == 3:
            parameter.copy_((parameter / step).floor() * step)
    return quantized


def _padded():
    batches = token_batches(batch=2)
    for batch in batches:
        batch["attention_mask"][0, -3:] = 0
    return batches


@pytest.mark.parametrize("positions", [0, 1])
@pytest.mark.parametrize("batches", [token_batches(), _padded()], ids=["whole", "padded"])
def test_routed_linears_have_no_vectors(positions, batches, capsys):
    model = _with_modules()
    found = bc_plugin.compensate(
        crudely_quantized(model), model, batches, {"positions": positions, "held_out": 0}
    )
    sites = {name.removeprefix("model.layers.0.") for name in found.vectors if ".0." in name}
    attention = {f"self_attn.{n}_proj" for n in "qkvo"}
    shared = {f"mlp.shared_experts.{n}_proj" for n in ("gate", "up", "down")}
    assert sites - {"model.layers.0"} == attention | shared | {"mlp.gate"}
    assert set(found.blocks) <= {"model.layers"} and "model.layers.0" in found.vectors
    assert all(error.after <= error.before for error in found.errors.values())
    printed = capsys.readouterr().out
    assert printed.count("27 weights of routed experts") == 1  # 3 layers, 3 experts, 3 linears
    assert "the first is model.layers.0.mlp.experts.0.gate_proj" in printed


def test_stacked_experts_are_named_and_linears_keep_their_vectors(capsys, recwarn):
    model = _with_stacks()
    quantized = _rounded_stacks(crudely_quantized(model))
    found = bc_plugin.compensate(quantized, model, token_batches())
    assert sorted(found.kinds.values()) == ["block"] * 3 + ["linear"] * 12
    assert "6 weights of routed experts, the first is model.layers.0.mlp.experts." in (
        capsys.readouterr().out
    )
    assert not [w for w in recwarn if "norms" in str(w.message)]


def test_moved_norms_are_still_noticed_beside_experts():
    model = _with_stacks()
    quantized = _rounded_stacks(crudely_quantized(model))
    quantized.model.layers[0].input_layernorm.weight.data *= 1.5
    with pytest.warns(UserWarning, match="norms"):
        found = bc_plugin.compensate(quantized, model, token_batches())
    assert "model.layers.0.self_attn.q_proj" not in found.vectors


def test_only_experts_are_quantized():
    model = _with_stacks()
    quantized = _rounded_stacks(model)
    found = bc_plugin.compensate(quantized, model, token_batches())
    assert set(found.kinds.values()) == {"block"}
    with pytest.raises(BiasCompensationError, match="only routed experts differ"):
        bc_plugin.compensate(quantized, model, token_batches(), {"sites": "linear"})


def test_a_convolution_is_no_expert():
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "mamba", vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    quantized = copy.deepcopy(model)
    for layer in quantized.backbone.layers:
        layer.mixer.conv1d.weight.data *= 1.1
    with pytest.raises(BiasCompensationError, match="the linears of both models are the same"):
        bc_plugin.compensate(quantized, model, token_batches())


def test_gptq_takes_no_mean_out_of_what_gets_no_vector():
    model = _with_modules()
    joint = JointGPTQ(model, find_blocks(model), 1)
    mixture = model.model.layers[0].mlp
    assert centred_inputs(mixture.experts[0].up_proj) is None
    assert centred_inputs(mixture.shared_experts.up_proj) is not None
    joint.stop()


def test_latent_attention_keeps_its_leading_position():
    """Its keys and values come in one head, (batch, 1, length, features)."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "deepseek_v2",
        vocab_size=VOCABULARY,
        **{**ROTARY, "num_key_value_heads": 4},
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        first_k_dense_replace=3,
        n_routed_experts=4,
        num_experts_per_tok=2,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    quantized = crudely_quantized(model)
    found = bc_plugin.compensate(quantized, model, token_batches(batch=2), {"held_out": 0})
    name = "model.layers.0.self_attn.kv_b_proj"
    found.attach(quantized)
    seen = []
    linear = quantized.get_submodule(name)
    handle = linear.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    with torch.no_grad():
        quantized(**token_batches(1, batch=2, seed=3)[0])
    handle.remove()
    ((given, output),) = seen
    assert given.shape[:3] == (2, 1, 16)
    added = output - nn.functional.linear(given, linear.weight)
    expected = found.vectors[name][[0] + [1] * 15].float().expand_as(added)
    torch.testing.assert_close(added, expected, rtol=1e-3, atol=1e-3)
