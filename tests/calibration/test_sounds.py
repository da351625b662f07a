"""Sounds in batches: as many as their frames allow, and all of them used."""

import torch

from bc_plugin.calibration.batches import rebatch, spread

CLIPS = {
    "whisper": {
        "input_features": torch.zeros(1, 80, 3000),
        "decoder_input_ids": torch.zeros(1, 20, dtype=torch.long),
    },
    "frames first": {"input_features": torch.zeros(1, 3000, 160)},
    "samples": {"input_values": torch.zeros(1, 3000 * 320)},
}


def test_a_batch_holds_as_many_clips_as_it_has_room_for_frames():
    for name, clip in CLIPS.items():
        batches = rebatch([clip] * 5, batch_tokens=6100)
        assert [len(next(iter(batch.values()))) for batch in batches] == [2, 2, 1], name


def test_all_clips_are_used():
    for name, clip in CLIPS.items():
        assert len(spread([clip] * 5, max_tokens=100)) == 5, name


def test_text_beside_images_is_counted_by_its_tokens():
    item = {
        "pixel_values": torch.zeros(1, 3, 32, 32),
        "input_ids": torch.zeros(1, 50, dtype=torch.long),
    }
    assert [len(batch["input_ids"]) for batch in rebatch([item] * 3, 100)] == [2, 1]
