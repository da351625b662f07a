"""Checkpoints that AutoRound made are told apart, and compensating them warns."""

import copy
import json
import warnings
from types import SimpleNamespace

import pytest
from helpers.language import crudely_quantized, tiny_model, token_batches
from helpers.packed import packed_checkpoint

import bc_plugin
from bc_plugin.shift.autoround import is_autoround

VERSION, PROVIDER = {"autoround_version": "0.16.1"}, {"provider": "auto-round"}


@pytest.mark.parametrize("settings", [VERSION, PROVIDER])
@pytest.mark.parametrize("kept", [dict, lambda settings: SimpleNamespace(**settings)])
def test_its_settings_tell(settings, kept):
    model = tiny_model()
    model.config.quantization_config = kept(settings)
    assert is_autoround(model)


@pytest.mark.parametrize("stored", [VERSION, PROVIDER, {}, None])
def test_settings_that_a_class_dropped_are_in_the_file(tmp_path, stored):
    model = tiny_model()
    model.config._name_or_path = str(tmp_path)
    model.config.quantization_config = SimpleNamespace(bits=4)
    if stored is not None:
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": stored}))
    assert is_autoround(model) == bool(stored)


def test_a_file_that_is_not_the_model_s_tells_nothing(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": VERSION}))
    monkeypatch.chdir(tmp_path)
    model = tiny_model()
    model.config.quantization_config = SimpleNamespace(bits=4)
    assert not is_autoround(model)


@pytest.mark.parametrize("damage", ["{", "[]", '{"quantization_config": null}'])
def test_a_file_that_cannot_be_read_tells_nothing(tmp_path, damage):
    model = tiny_model()
    model.config._name_or_path = str(tmp_path)
    model.config.quantization_config = SimpleNamespace(bits=4)
    (tmp_path / "config.json").write_text(damage)
    assert not is_autoround(model)


def test_only_its_checkpoints_warn():
    model = tiny_model()
    quantized = crudely_quantized(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bc_plugin.compensate(quantized, model, token_batches())
    quantized.config.quantization_config = VERSION
    with pytest.warns(UserWarning, match="AutoRound quantizes this model"):
        bc_plugin.compensate(quantized, model, token_batches())


def test_one_that_is_streamed_warns(tmp_path):
    model = tiny_model(intermediate_size=64, num_hidden_layers=2, num_key_value_heads=4)
    model.save_pretrained(tmp_path / "float")
    packed_checkpoint(tmp_path / "packed", copy.deepcopy(model))
    path = tmp_path / "packed" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= PROVIDER
    path.write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="AutoRound quantizes this model"):
        bc_plugin.compensate(tmp_path / "packed", tmp_path / "float", token_batches())
