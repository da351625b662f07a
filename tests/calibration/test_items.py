"""Calibration items of odd shapes work, or are refused by their number."""

import pytest
import torch
from helpers.language import VOCABULARY, crudely_quantized, tiny_model, token_batches
from torch import nn

import bc_plugin
from bc_plugin import BiasCompensationError
from bc_plugin.calibration.batches import rebatch
from bc_plugin.calibration.items import checked_items, vocabulary_of

IDS = torch.tensor([[3, 4, 5]])
ROW = {"input_ids": IDS[0], "attention_mask": torch.ones(3, dtype=torch.long)}


@pytest.mark.parametrize(
    "item",
    [
        ROW,
        {"input_ids": [3, 4, 5], "attention_mask": [1, 1, 1]},
        {"input_ids": [[3, 4, 5]], "attention_mask": [[1, 1, 1]]},
        {"input_ids": IDS.numpy(), "attention_mask": torch.ones(1, 3)},
        {"input_ids": IDS, "attention_mask": [[1, 1, 1]]},
        {"input_ids": IDS.int(), "attention_mask": torch.ones(1, 3, dtype=torch.bool)},
    ],
)
def test_a_sequence_in_another_form_is_the_same(item):
    (found,) = checked_items([item], VOCABULARY)
    assert torch.equal(found["input_ids"], IDS)
    assert torch.equal(found["attention_mask"], torch.ones(1, 3))


def test_a_lone_tensor_may_be_one_sequence():
    assert checked_items([IDS[0]], VOCABULARY)[0][""].shape == (1, 3)
    assert rebatch([torch.zeros(1, 2)], 99)[0].dtype == torch.float32  # of a model without tokens


def test_sequences_of_different_lengths_are_batches_of_their_own():
    items = [{"input_ids": [3, 4]}, {"input_ids": [3, 4, 5]}, {"input_ids": [5, 4]}]
    assert [b["input_ids"].shape for b in rebatch(items, 99)] == [(2, 2), (1, 3)]


def _long(*shape):
    return torch.ones(shape, dtype=torch.long)


REFUSED = {
    "a word": ("text", "is of type str; expected a dict of tensors"),
    "nothing": (None, "is of type NoneType"),
    "an empty dict": ({}, "is of type dict"),
    "floats": ({"input_ids": torch.ones(1, 3)}, "input_ids of type torch.float32; expected whole"),
    "a lone float tensor": (torch.ones(1, 3), "input_ids of type torch.float32; expected whole"),
    "no tokens": ({"input_ids": _long(1, 0)}, r"of shape \(1, 0\); expected \(batch, length\)"),
    "no list": ({"input_ids": []}, "input_ids of type torch.float32"),
    "a number": ({"input_ids": torch.tensor(3)}, r"of shape \(\); expected \(batch, length\)"),
    "beyond": ({"input_ids": IDS + VOCABULARY}, "from 99 to 101; expected 0 to 95, the vocabulary"),
    "below": ({"input_ids": -IDS}, "input_ids from -5 to -3; expected 0 to 95"),
    "a longer mask": (
        {"input_ids": IDS, "attention_mask": _long(1, 4)},
        r"an attention_mask of shape \(1, 4\); expected that of its input_ids, \(1, 3\)",
    ),
    "a mask of one row": (
        {"input_ids": IDS.expand(2, 3), "attention_mask": _long(1, 3)},
        r"of shape \(1, 3\); expected that of its input_ids, \(2, 3\)",
    ),
    "ragged": ({"input_ids": [[3, 4], [5]]}, "input_ids makes no tensor .* rows of one length"),
    "words": ({"input_ids": IDS, "text": ["a"]}, "text makes no tensor"),
    "a dict": ({"input_ids": IDS, "more": {}}, "more makes no tensor"),
    "all padding": ({"input_ids": IDS, "attention_mask": 0 * IDS}, "all padding"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_model_takes_is_refused_by_its_number(name):
    item, said = REFUSED[name]
    with pytest.raises(BiasCompensationError, match=f"calibration item 2 .*{said}|item 2: {said}"):
        checked_items([ROW, ROW, item], VOCABULARY)


def test_the_number_is_that_of_the_data_whatever_is_held_out():
    model = tiny_model()
    items = [*token_batches(30), {"input_ids": IDS + VOCABULARY}]
    for compute in (
        lambda: bc_plugin.compensate(crudely_quantized(model), model, items, {"max_tokens": 32}),
        lambda: bc_plugin.record_float_logits(model, items, folder="none"),
    ):
        with pytest.raises(BiasCompensationError, match="item 30 has input_ids from 99 to 101"):
            compute()


def test_nothing_to_calibrate_on():
    model = tiny_model()
    with pytest.raises(BiasCompensationError, match="calibration data is empty"):
        bc_plugin.compensate(crudely_quantized(model), model, [])


def test_a_model_that_is_called_with_something_else_has_no_vocabulary():
    assert vocabulary_of(tiny_model()) == VOCABULARY
    assert vocabulary_of(nn.Linear(2, 2)) is None
