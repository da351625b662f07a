"""Calibration data without a data set."""

import torch
from helpers.language import LetterTokenizer, tiny_model

from bc_plugin.calibration.sample import sample_from


def test_calibration_data_that_the_model_writes_itself():
    model, tokenizer = tiny_model(), LetterTokenizer()
    found = sample_from(model, tokenizer, length=12, count=5, batch=2)
    again = sample_from(model, tokenizer, length=12, count=5, batch=2)
    other = sample_from(model, tokenizer, length=12, count=5, batch=2, seed=1)
    assert [item["input_ids"].shape for item in found] == [(1, 12)] * 5
    assert all(item["attention_mask"].all() for item in found)
    assert all(
        torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(found, again, strict=True)
    )
    assert not torch.equal(found[0]["input_ids"], other[0]["input_ids"])
    assert len({tuple(item["input_ids"][0].tolist()) for item in found}) == 5
    assert all(item["input_ids"][0, 0] > 2 for item in found)
