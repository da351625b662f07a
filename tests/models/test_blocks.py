"""Lists of blocks: found in a model, or named by their paths."""

import pytest
from helpers.images import tiny
from torch import nn

from bc_plugin import BiasCompensationError
from bc_plugin.models.blocks import find_block_lists, find_blocks

SWIN = ("swin.encoder.layers.0.blocks", "swin.encoder.layers.1.blocks")
DETR = ("model.encoder.layers", "model.decoder.layers")


def test_two_lists_of_blocks_must_be_told_apart():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.vision = nn.ModuleList([nn.Linear(2, 2)])
            self.text = nn.ModuleList([nn.Linear(2, 2)])

    with pytest.raises(BiasCompensationError, match=r"\['vision', 'text'\]"):
        find_blocks(Two())
    assert find_blocks(Two(), "text").names == ("text.0",)
    with pytest.raises(BiasCompensationError, match="'middle' is not a list"):
        find_blocks(Two(), "middle")


def test_stages_and_encoder_decoders_are_found():
    swin, detr = tiny("swin"), tiny("detr")
    assert tuple(blocks.path for blocks in find_block_lists(swin)) == SWIN
    assert tuple(blocks.path for blocks in find_block_lists(swin, "swin.encoder.layers")) == SWIN
    assert tuple(blocks.path for blocks in find_block_lists(detr)) == DETR
    assert [blocks.owner for blocks in find_block_lists(detr)] == ["model.encoder", "model.decoder"]
    with pytest.raises(BiasCompensationError, match="works on one"):
        find_blocks(swin)


def test_a_list_within_blocks_makes_no_stages():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.Linear(4, 4)
            self.ffn = nn.ModuleList([nn.Sequential(nn.Linear(4, 4)) for _ in range(2)])

    model = nn.Module()
    model.layers = nn.ModuleList([Block() for _ in range(3)])
    assert find_blocks(model).names == ("layers.0", "layers.1", "layers.2")
