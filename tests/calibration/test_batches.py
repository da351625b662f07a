"""What is batched together, and what is held out."""

import pytest
import torch
from helpers.language import token_batches

from bc_plugin.calibration.batches import rebatch, split_held_out, spread


def test_rebatch_joins_what_has_one_shape():
    items = token_batches(3, length=4) + token_batches(2, length=5)
    sizes = [tuple(batch["input_ids"].shape) for batch in rebatch(items, batch_tokens=8)]
    assert sorted(sizes) == [(1, 4), (1, 5), (1, 5), (2, 4)]
    assert [b.shape for b in rebatch([torch.zeros(1, 2), torch.zeros(1, 2)], 99)] == [(2, 2)]


def test_images_are_batched_by_their_patches_and_all_used():
    images = [{"pixel_values": torch.zeros(1, 3, 32, 64)} for _ in range(5)]  # 8 patches each
    sizes = [len(batch["pixel_values"]) for batch in rebatch(images, batch_tokens=16)]
    assert sizes == [2, 2, 1]
    assert len(spread(images, max_tokens=16)) == 5


@pytest.mark.parametrize(
    ("count", "share", "apart"), [(32, 0.125, 4), (1, 0.5, 0), (2, 0.01, 1), (9, 0, 0)]
)
def test_held_out_items(count, share, apart):
    kept, held_out = split_held_out(list(range(count)), share)
    assert len(held_out) == apart
    assert sorted(kept + held_out) == list(range(count))
