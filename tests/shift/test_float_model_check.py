"""Is it the float model that was quantized? Others are refused."""

import copy

import pytest
import torch
from helpers.images import inputs, tiny
from helpers.language import crudely_quantized, tiny_model, token_batches
from torch import nn

import bc_plugin
from bc_plugin import BiasCompensationError
from bc_plugin.models.blocks import find_blocks
from bc_plugin.models.float_blocks import BlockSnapshot

OTHER = "not quantized from this float model"
HEADS = {"num_key_value_heads": 4}


@torch.no_grad()
def _rotated(model):
    """The same function with another residual stream, as QuaRot has it; norms become ones."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(3)
    width = model.config.hidden_size
    rotation = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]

    def read(linear, norm):
        linear.weight.copy_(linear.weight * norm.weight @ rotation)

    for layer in model.model.layers:
        for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            read(linear, layer.input_layernorm)
        for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
            read(linear, layer.post_attention_layernorm)
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.weight.copy_(rotation.T @ linear.weight)
    read(model.lm_head, model.model.norm)
    model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight @ rotation)
    for name, norm in model.named_modules():
        if name.endswith("norm"):
            norm.weight.fill_(1)
    return model


def _in_a_row(model):
    for layer in model.model.layers:
        yield layer.self_attn.v_proj.weight, layer.self_attn.o_proj.weight
        yield layer.mlp.up_proj.weight, layer.mlp.down_proj.weight


@torch.no_grad()
def _scales_moved(model, spread):
    """The same function, scales moved from one linear into the next and no norm changed."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    for out, into in _in_a_row(model):
        scales = (spread * torch.randn(len(out), generator=generator)).exp()
        out.div_(scales[:, None])
        into.mul_(scales)
    return model


@torch.no_grad()
def _heads_rotated(model):
    """The same function, the values of each head rotated, as in SpinQuant's R2."""
    model = copy.deepcopy(model)
    size = model.config.head_dim
    generator = torch.Generator().manual_seed(2)
    for layer in model.model.layers:
        rotation = torch.linalg.qr(torch.randn(size, size, generator=generator))[0]
        value, out = layer.self_attn.v_proj.weight, layer.self_attn.o_proj.weight
        value.copy_((rotation.T @ value.view(-1, size, value.shape[1])).flatten(0, 1))
        out.copy_((out.view(out.shape[0], -1, size) @ rotation).flatten(1))
    return model


def _same_function(model, other):
    batch = token_batches(1)[0]
    with torch.no_grad():
        return torch.allclose(model(**batch).logits, other(**batch).logits, atol=1e-3)


@pytest.mark.parametrize("sites", [("linear",), ("block",), ("linear", "block")])
@pytest.mark.parametrize("architecture", ["llama", "opt", "phi3", "gemma3_text"])
def test_another_checkpoint_of_the_same_shapes_is_refused(architecture, sites):
    quantized = crudely_quantized(tiny_model(architecture))
    other = tiny_model(architecture, seed=1)
    message = "no site is left" if sites == ("linear",) else OTHER
    with pytest.raises(BiasCompensationError, match=message):
        bc_plugin.compensate(quantized, other, token_batches(), {"sites": sites})


def test_so_is_a_snapshot_of_another_models_blocks():
    other = tiny_model(seed=1)
    with pytest.raises(BiasCompensationError, match=OTHER):
        bc_plugin.compensate(
            crudely_quantized(tiny_model()),
            BlockSnapshot(other, find_blocks(other)),
            token_batches(),
        )


@pytest.mark.parametrize("kind", ["vit", "bert", "swin"])
def test_so_is_another_encoder(kind):
    other = tiny(kind)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2, generator=generator)
    with pytest.raises(BiasCompensationError, match=OTHER):
        bc_plugin.compensate(crudely_quantized(tiny(kind)), other, inputs(kind), {"positions": 0})


@pytest.mark.parametrize("sites", [("block",), ("linear", "block")])
def test_a_rotated_residual_stream_is_refused(sites):
    model = tiny_model(**HEADS)
    rotated = _rotated(model)
    assert _same_function(model, rotated)
    with pytest.raises(BiasCompensationError, match=OTHER):
        bc_plugin.compensate(crudely_quantized(rotated), model, token_batches(), {"sites": sites})


@pytest.mark.parametrize(
    "change",
    [
        lambda model: _scales_moved(model, 1.0),
        lambda model: _scales_moved(model, 0.2),
        _heads_rotated,
    ],
    ids=["scales", "small scales", "heads rotated"],
)
def test_what_is_moved_between_linears_leaves_only_blocks(change):
    model = tiny_model(**HEADS)
    changed = change(model)
    assert _same_function(model, changed)
    quantized = crudely_quantized(changed, step=0.02)
    batches = token_batches(16)
    with pytest.warns(UserWarning, match="Only outputs of blocks"):
        compensation = bc_plugin.compensate(quantized, model, batches)
    assert set(compensation.kinds.values()) == {"block"}
    with pytest.raises(BiasCompensationError, match="no site is left"):
        bc_plugin.compensate(quantized, model, batches, {"sites": ("linear",)})


@pytest.mark.parametrize("step", [0.05, 0.2, 0.5])
@pytest.mark.parametrize("positions", [0, 1, "all"])
def test_however_coarsely_it_was_rounded_it_is_the_same_model(step, positions):
    model = tiny_model()
    compensation = bc_plugin.compensate(
        crudely_quantized(model, step), model, token_batches(), {"positions": positions}
    )
    assert set(compensation.kinds.values()) == {"linear", "block"}


def test_inputs_rounded_to_almost_nothing_are_accepted():
    class Quantized(nn.Linear):
        def forward(self, inputs):
            step = (inputs.amax() - inputs.amin()) / 7
            return super().forward((inputs / step).round() * step)

    model = tiny_model()
    quantized = crudely_quantized(model)
    for module in quantized.model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Quantized
    compensation = bc_plugin.compensate(quantized, model, token_batches())
    assert set(compensation.kinds.values()) == {"linear", "block"}


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, "rope_theta"),
        ({"rms_norm_eps": 1e-3}, "rms_norm_eps"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4}, "heads|head_dim"),
    ],
)
def test_settings_that_change_what_weights_compute_have_to_agree(changes, setting):
    quantized = crudely_quantized(tiny_model())
    with pytest.raises(BiasCompensationError, match=setting):
        bc_plugin.compensate(quantized, tiny_model(**changes), token_batches())


def test_settings_that_do_not_may_differ():
    model = tiny_model()
    quantized = crudely_quantized(model)
    quantized.config.rms_norm_eps *= 1 + 1e-6  # read from a file with single precision
    quantized.config.update(
        {"use_cache": False, "attention_dropout": 0.1, "pad_token_id": 5, "head_dim": None}
    )
    quantized.config.quantization_config = {"rope_theta": 1}
    quantized.config._name_or_path = "elsewhere"
    bc_plugin.compensate(quantized, model, token_batches())


def test_swapped_arguments_are_noticed_where_weights_are_packed():
    class Packed(nn.Linear):  # as bitsandbytes has it
        def forward(self, inputs):
            return nn.functional.linear(inputs, self.weight.to(inputs) / 32)

    model = tiny_model()
    quantized = copy.deepcopy(model)
    for module in quantized.model.layers.modules():
        if type(module) is nn.Linear:
            module.__class__ = Packed
            packed = (module.weight.detach() * 32).floor().to(torch.int8)
            module.weight = nn.Parameter(packed, requires_grad=False)
    with pytest.raises(BiasCompensationError, match="quantized model first"):
        bc_plugin.compensate(model, quantized, token_batches())
    assert bc_plugin.compensate(quantized, model, token_batches()).vectors
