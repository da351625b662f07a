"""Attention masks of blocks: what they say of tokens, and what they are in another type."""

import pytest
import torch
from helpers.language import crudely_quantized, tiny_model, token_batches
from transformers import AutoModel, BertConfig

import bc_plugin
from bc_plugin.models.blocks import find_block_lists
from bc_plugin.models.positions import token_index
from bc_plugin.models.record import record_calls

PADDING = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
INDEX = [[0, 1, 2, 3, 4, 5], [-1, -1, 0, 1, 2, 3], [0, 1, 2, 3, -1, -1]]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_an_encoder_knows_its_padding(attention):
    """Its blocks are given the mask of whom each token attends to, later tokens included."""
    config = BertConfig(
        vocab_size=96,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
    )
    model = AutoModel.from_config(config, attn_implementation=attention).eval()
    batch = {"input_ids": torch.randint(3, 96, PADDING.shape), "attention_mask": PADDING}
    (blocks,) = find_block_lists(model)
    with torch.no_grad():
        (calls,) = record_calls(model, blocks, [batch], torch.device("cpu"))
    assert calls.index.tolist() == INDEX


def _mask(shape: str) -> torch.Tensor:
    keys = PADDING.bool()[:, None, None]  # (batch, 1, 1, key)
    causal = torch.ones(6, 6).tril().bool()
    return {
        "one row for all": keys,
        "everybody": keys.expand(-1, 1, 6, 6),
        "real ones only": keys & keys.transpose(2, 3),
        "causal": keys & causal,
    }[shape]


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("shape", ["one row for all", "everybody", "real ones only", "causal"])
def test_masks_of_all_shapes_say_the_same(shape, additive):
    mask = _mask(shape)
    if additive:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    index = token_index({"input_ids": PADDING, "attention_mask": mask})
    assert index.tolist() == INDEX


def test_packed_sequences_of_an_encoder_start_anew():
    owner = torch.tensor([0, 0, 0, 1, 1, 2])
    mask = (owner[:, None] == owner)[None, None]
    index = token_index({"input_ids": PADDING[:1], "attention_mask": mask})
    assert index.tolist() == [[0, 1, 2, 0, 1, 0]]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_in_half_precision_takes_the_masks_of_the_float_model(side, dtype):
    """Padding on the left attends to nothing; minus infinity there would make it NaN."""
    model = tiny_model().to(dtype)
    quantized = crudely_quantized(model).half()
    for each in (model, quantized):
        each.set_attn_implementation("eager")
    batches = token_batches()
    padded = slice(0, 4) if side == "left" else slice(-4, None)
    for batch in batches:
        batch["attention_mask"][:, padded] = 0
    compensation = bc_plugin.compensate(quantized, model, batches)
    assert all(errors.after <= errors.before for errors in compensation.errors.values())
