"""Text, read and cut into sequences."""

import pytest
from helpers.language import LetterTokenizer

from bc_plugin import BiasCompensationError
from bc_plugin.calibration import read_text, windows


def test_windows_follow_each_other():
    found = windows("abcdefgh", LetterTokenizer(), length=3, skip=1)
    assert [w["input_ids"].tolist() for w in found] == [[[100, 101, 102]]]
    assert found[0]["attention_mask"].tolist() == [[1, 1, 1]]


def test_a_text_shorter_than_a_window_is_refused():
    with pytest.raises(BiasCompensationError, match="2 tokens"):
        windows("ab", LetterTokenizer(), length=3)


def test_text_is_read_from_files(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo")
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert read_text(str(tmp_path / "a.txt")) == "one\ntwo"
    assert read_text(str(tmp_path / "b.jsonl")) == "one\n\ntwo"
    with pytest.raises(BiasCompensationError, match="neither a file nor"):
        read_text(str(tmp_path / "c.txt"))
