"""Stages and encoder-decoders: models whose blocks stand in several lists."""

import pytest
import torch
from helpers.images import inputs, mean_shifts, tiny
from helpers.language import crudely_quantized
from torch import nn
from transformers import BartConfig, BartModel, T5Config, T5Model

import bc_plugin
from bc_plugin import BiasCompensationError, Compensation

EXACT = {"positions": 0, "dtype": "float64", "held_out": 0}
SWIN = ("swin.encoder.layers.0.blocks", "swin.encoder.layers.1.blocks")
TEXT = {"d_model": 32, "vocab_size": 96, "decoder_start_token_id": 0, "pad_token_id": 0}
T5 = {"d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
BART = {
    f"{side}_{name}": value
    for side in ("encoder", "decoder")
    for name, value in {"layers": 2, "ffn_dim": 48, "attention_heads": 4}.items()
}


def encoder_decoder(kind):
    if kind == "detr":
        model = tiny("detr")
    else:
        torch.manual_seed(0)
        model = (
            T5Model(T5Config(**TEXT, **T5))
            if kind == "t5"
            else BartModel(BartConfig(**TEXT, **BART))
        )
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.2)
    return model.eval().double()


def padded(kind):
    """Batches whose second half is padding on the encoder's side; how many tokens are left."""
    torch.manual_seed(0)
    if kind == "detr":
        mask = torch.ones(2, 16, 16, dtype=torch.long)
        mask[1, 8:] = 0
        images = [torch.randn(2, 3, 16, 16).double() for _ in range(3)]
        return [{"pixel_values": image, "pixel_mask": mask} for image in images]
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[1, 5:] = 0
    return [
        {
            "input_ids": torch.randint(3, 96, (2, 10)),
            "attention_mask": mask,
            "decoder_input_ids": torch.randint(3, 96, (2, 7)),
        }
        for _ in range(3)
    ]


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ("model.encoder", "not a list of blocks in DetrFor"),
        (["model.encoder.layers", "model.backbone"], "'model.backbone' is not a list"),
        (["model.encoder.layers", "model.encoder.layers"], "there twice"),
    ],
)
def test_wrong_paths_are_refused(blocks, message):
    model = tiny("detr")
    config = {"positions": 0, "blocks": blocks}
    with pytest.raises(BiasCompensationError, match=message):
        bc_plugin.compensate(crudely_quantized(model), model, inputs("detr"), config)


@pytest.mark.parametrize("positions", [1, "all"])
@pytest.mark.parametrize("kind", ["swin", "detr"])
def test_leading_positions_across_lists_are_refused(kind, positions):
    model = tiny(kind)
    config = {"positions": positions, "sites": "block"}
    with pytest.raises(BiasCompensationError, match=r"2 lists of blocks.*positions=0"):
        bc_plugin.compensate(crudely_quantized(model), model, inputs(kind), config)


def test_leading_positions_within_windows_are_refused_and_blocks_have_them():
    model = tiny("swin")
    quantized = crudely_quantized(model)
    config = {"positions": 1, "blocks": SWIN[0]}
    with pytest.raises(BiasCompensationError, match=r"q_proj.*windowed.*positions=0"):
        bc_plugin.compensate(quantized, model, inputs("swin"), config)
    compensation = bc_plugin.compensate(
        quantized, model, inputs("swin"), {**config, "sites": "block"}
    )
    assert set(compensation.vectors) == {f"{SWIN[0]}.{i}" for i in range(2)}
    assert {tuple(vectors.shape) for vectors in compensation.vectors.values()} == {(2, 16)}


def test_a_stage_of_one_window_has_leading_positions():
    model = tiny("swin")
    config = {"positions": 1, "blocks": SWIN[1]}
    compensation = bc_plugin.compensate(crudely_quantized(model), model, inputs("swin"), config)
    assert compensation.vectors[f"{SWIN[1]}.0.attention.q_proj"].shape == (2, 32)


def check_linears(compensation, expected):
    assert expected
    for name, shift in expected.items():
        torch.testing.assert_close(
            compensation.vectors[name][0], shift, rtol=1e-8, atol=1e-10, msg=name
        )


def test_every_stage_is_fed_what_the_float_model_gives_it():
    model = tiny("swin").double()
    quantized = crudely_quantized(model)
    batches = [{"pixel_values": batch["pixel_values"].double()} for batch in inputs("swin", 3)]
    compensation = bc_plugin.compensate(quantized, model, batches, EXACT)
    linears = [n for n, kind in compensation.kinds.items() if kind == "linear"]
    assert "swin.encoder.layers.0.downsample.reduction" in linears
    assert "classifier" not in compensation.vectors
    check_linears(compensation, mean_shifts(model, quantized, linears, batches))


@pytest.mark.parametrize("kind", ["detr", "t5", "bart"])
def test_padding_counts_on_neither_side_of_cross_attention(kind):
    model = encoder_decoder(kind)
    quantized = crudely_quantized(model)
    batches = padded(kind)
    compensation = bc_plugin.compensate(quantized, model, batches, EXACT)
    linears = [n for n, kind in compensation.kinds.items() if kind == "linear"]
    own = {"detr": 5, "t5": 7, "bart": 7}[kind]  # tokens of the decoder

    def real(tokens):  # of the encoder's the second half of the second row is padding
        return slice(tokens if tokens == 2 * own else tokens * 3 // 4)

    expected = mean_shifts(model, quantized, linears, batches, real)
    assert any(
        "decoder" in name and name.endswith(("v_proj", "EncDecAttention.v")) for name in expected
    )
    check_linears(compensation, expected)
    assert set(compensation.kinds.values()) >= {"linear", "block"}


def test_padding_that_cannot_be_told_apart_is_refused():
    model = encoder_decoder("bart")
    batches = [
        {**batch, "decoder_input_ids": torch.randint(3, 96, (2, 10))} for batch in padded("bart")
    ]
    with pytest.raises(BiasCompensationError, match="without padding"):
        bc_plugin.compensate(crudely_quantized(model), model, batches, EXACT)


def test_the_entry_names_one_path_as_ever_and_several_as_a_list():
    swin = tiny("swin")
    several = bc_plugin.compensate(crudely_quantized(swin), swin, inputs("swin"), {"positions": 0})
    assert several.entry()["blocks"] == list(SWIN)
    one = bc_plugin.compensate(
        crudely_quantized(swin), swin, inputs("swin"), {"positions": 0, "blocks": SWIN[0]}
    )
    assert one.entry()["blocks"] == SWIN[0]
    for compensation in (one, several):
        read = Compensation.from_entry(compensation.entry(), compensation.vectors)
        assert read.blocks == compensation.blocks
        read.check(crudely_quantized(swin))


@pytest.mark.parametrize("stage", [0, 1])
def test_weights_of_every_list_count_in_the_digest(stage):
    model = tiny("swin")
    quantized = crudely_quantized(model)
    compensation = bc_plugin.compensate(quantized, model, inputs("swin"), {"positions": 0})
    quantized.get_submodule(SWIN[stage])[0].mlp.fc1.weight.data.mul_(1.5)
    with pytest.raises(BiasCompensationError, match="digest"):
        compensation.attach(quantized)
