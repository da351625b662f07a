"""What transformers cannot load is said by the argument's name."""

import sys
from types import ModuleType

import pytest
from helpers.language import tiny_model

from bc_plugin import BiasCompensationError
from bc_plugin.calibration import read_text
from bc_plugin.cli import inputs
from bc_plugin.cli.inputs import load_model, load_tokenizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs") / "float"
    tiny_model().save_pretrained(folder)
    return folder


def test_a_folder_without_a_tokenizer(saved):
    expected = f"the tokenizer of FLOAT, {saved}, cannot be loaded .* name another"
    with pytest.raises(BiasCompensationError, match=expected):
        load_tokenizer("FLOAT", str(saved))


def test_a_damaged_file_is_named(saved):
    load_model("FLOAT", str(saved), "auto", "cpu")
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:3000])
    expected = f"FLOAT, {saved}, cannot be loaded \\({weights} is damaged"
    with pytest.raises(BiasCompensationError, match=expected):
        load_model("FLOAT", str(saved), "auto", "cpu")


def test_a_folder_without_weights(saved):
    (saved / "model.safetensors").unlink()
    with pytest.raises(BiasCompensationError, match=r"FLOAT, .*cannot be loaded .*safetensors"):
        load_model("FLOAT", str(saved), "auto", "cpu")


def test_a_hub_that_does_not_answer(monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("offline")

    made = ModuleType("datasets")
    made.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", made)
    with pytest.raises(BiasCompensationError, match=r"'c4' .* hub \(ConnectionError: offline\)"):
        read_text("c4")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(BiasCompensationError, match="pip install datasets"):
        read_text("wikitext2")


@pytest.mark.parametrize("given", ["the text", None])
def test_the_float_model_is_loaded_once(monkeypatch, given):
    loaded = []
    monkeypatch.setattr(inputs, "load_tokenizer", lambda *_: "tokenizer")
    monkeypatch.setattr(inputs, "load_model", lambda *a: loaded.append(a) or ["model"])

    def data(text, tokenizer, length, samples, float_model):
        return float_model() if text is None else text

    monkeypatch.setattr(inputs, "calibration_data", data)
    _, calibration, model = inputs.float_inputs("float", given, 16, 4, "auto", "cpu")
    assert len(loaded) == 1
    assert calibration == (model if given is None else given)
