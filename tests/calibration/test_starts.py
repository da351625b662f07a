"""Sequences start as the tokenizer starts a text."""

import pytest
import torch
from helpers.language import VOCABULARY, tiny_model
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from bc_plugin import BiasCompensationError
from bc_plugin.calibration.sample import sample_from
from bc_plugin.calibration.text import start_of_text, windows

TEXT = " ".join(f"w{i}" for i in range(10, 30))


def _tokenizer(template: str | None, special_tokens: list[str] | None = None):
    """Words are tokens; ``template`` says what stands around a text."""
    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCABULARY)}, "w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if template is not None:
        added = [(word, int(word[1:])) for word in template.split() if word != "$A"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=added
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    if special_tokens:
        fast.add_special_tokens({"additional_special_tokens": special_tokens})
    return fast


@pytest.mark.parametrize(
    ("template", "start"),
    [(None, []), ("w1 $A", [1]), ("w1 w2 $A", [1, 2]), ("$A w3", []), ("w1 $A w3", [1])],
)
def test_what_a_tokenizer_starts_a_text_with(template, start):
    assert start_of_text(_tokenizer(template)) == start


@pytest.mark.parametrize("template", [None, "w1 $A", "w1 w2 $A w3"])
def test_every_window_starts_as_a_text_does(template):
    tokenizer = _tokenizer(template)
    start = start_of_text(tokenizer)
    found = windows(TEXT, tokenizer, length=6)
    assert all(item["input_ids"].shape == (1, 6) for item in found)
    assert all(item["attention_mask"].tolist() == [[1] * 6] for item in found)
    rows = [item["input_ids"][0].tolist() for item in found]
    assert all(row[: len(start)] == start for row in rows)
    words = [token for row in rows for token in row[len(start) :]]
    assert words == list(range(10, 10 + len(words)))  # none is lost in between
    assert len(words) == 20 // (6 - len(start)) * (6 - len(start))
    skipped = windows(TEXT, tokenizer, length=6, count=1, skip=2)
    assert [item["input_ids"].tolist() for item in skipped] == [[rows[2]]]


def test_a_window_without_room_for_text_is_refused():
    with pytest.raises(BiasCompensationError, match="no room for text"):
        windows(TEXT, _tokenizer("w1 w2 $A"), length=2)
    with pytest.raises(BiasCompensationError, match="start with"):
        sample_from(tiny_model(), _tokenizer("w1 w2 $A"), length=3, count=1)


def test_what_the_model_writes_starts_as_a_text_does():
    found = sample_from(tiny_model(), _tokenizer("w1 w2 $A"), length=9, count=3)
    rows = torch.cat([item["input_ids"] for item in found])
    assert rows.shape == (3, 9)
    assert rows[:, :2].tolist() == [[1, 2]] * 3
    assert len({tuple(row) for row in rows[:, 2:].tolist()}) == 3


def test_a_special_token_beyond_the_vocabulary_starts_nothing_either():
    tokenizer = _tokenizer(None, ["w1", f"w{VOCABULARY + 7}"])
    assert max(tokenizer.all_special_ids) >= VOCABULARY
    found = sample_from(tiny_model(), tokenizer, length=3, count=2 * VOCABULARY)
    assert 1 not in {item["input_ids"][0, 0].item() for item in found}


def test_the_model_writes_by_its_own_distribution():
    """Whatever its generation config adds for those who talk to it."""
    model, tokenizer = tiny_model(), _tokenizer(None)
    expected = sample_from(model, tokenizer, length=12, count=4)
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.min_p = 0.5
    before = model.generation_config
    found = sample_from(model, tokenizer, length=12, count=4)
    assert all(
        torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(found, expected, strict=True)
    )
    assert model.generation_config is before
