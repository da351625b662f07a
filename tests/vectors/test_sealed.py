"""The config of a jointly quantized checkpoint: files say what it needs, and keep its values."""

import copy
import json

import pytest
from helpers.language import crudely_quantized, tiny_model, token_batches

import bc_plugin
from bc_plugin import BiasCompensationError, Compensation
from bc_plugin.names import KEY
from bc_plugin.toolkits.flag import config_of, is_entry
from bc_plugin.vectors.joint import (
    entry_to_save,
    joint_linears,
    note_saved_without,
    saved_without,
)
from bc_plugin.vectors.sealed import NEEDS, SEALED, seal, unseal
from bc_plugin.vectors.settings import read_settings

ENTRY = {"format_version": 2, "joint": True, "digest": "0"}
JOINT = {"bits": 3, "quant_method": "gptq", KEY: ENTRY}
GROUPS = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 3}}}
COMPRESSED = {"config_groups": GROUPS, "quant_method": "compressed-tensors", KEY: ENTRY}


@pytest.fixture
def compensated():
    """A joint model with its vectors attached."""
    model = tiny_model()
    quantized = crudely_quantized(model)
    quantized.config.quantization_config = {"bits": 3, "quant_method": "gptq"}
    found = bc_plugin.compensate(quantized, model, token_batches()).replaced(joint=True)
    found.attach(quantized)
    return quantized, found


@pytest.mark.parametrize(
    "settings", [JOINT, {**JOINT, "checkpoint_format": "gptq"}, COMPRESSED], ids=str
)
def test_what_is_sealed_says_what_it_needs_and_is_itself_again(settings):
    kept = copy.deepcopy(settings)
    sealed = seal(settings)
    for name in SEALED[settings["quant_method"]]:
        assert NEEDS in sealed[name]
    assert "bias_compensation" in NEEDS and "bc_plugin.enable()" in NEEDS
    assert unseal(json.loads(json.dumps(sealed))) == settings == kept
    assert seal(sealed) == sealed
    assert unseal(settings) == settings


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 3},
        {"bits": 3, KEY: {"format_version": 2, "joint": False, "digest": "0"}},
        {"bits": 3, KEY: {"positions": 1, "joint": True}},  # a request
        {"bits": 3, KEY: True},
        {"quant_method": "bitsandbytes", KEY: ENTRY},
    ],
    ids=["plain", "not joint", "request", "flag", "of somebody else's"],
)
def test_any_other_config_stays_as_it_is(settings):
    assert seal(settings) == unseal(settings) == settings


@pytest.mark.parametrize("values", [None, {}, 3])
@pytest.mark.parametrize(("settings", "first"), [(JOINT, "bits"), (COMPRESSED, "config_groups")])
def test_a_seal_without_its_values_is_refused(values, settings, first):
    sealed = seal(settings)
    sealed[KEY] = {**sealed[KEY], "sealed": values}
    with pytest.raises(BiasCompensationError, match=f"'sealed' with the values of {first}"):
        unseal(sealed)
    del sealed[KEY]
    with pytest.raises(BiasCompensationError, match="Take the config from the original"):
        unseal(sealed)


@pytest.mark.parametrize("name", ["config.json", "quantize_config.json"])
def test_settings_are_read_unsealed(tmp_path, name):
    content = seal(JOINT)
    (tmp_path / name).write_text(
        json.dumps({"quantization_config": content} if name == "config.json" else content)
    )
    assert read_settings(tmp_path) == JOINT


def test_a_dict_is_sealed_in_the_model_since_it_is_saved_as_it_is(compensated):
    quantized, found = compensated
    assert quantized.config.quantization_config["bits"] == NEEDS
    plain = unseal(quantized.config.quantization_config)
    assert plain == {"bits": 3, "quant_method": "gptq", KEY: found.entry()}


def test_joint_weights_that_lost_their_vectors_say_so_when_saved(compensated, tmp_path):
    quantized, found = compensated
    found.detach(quantized)
    quantized.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert written["bits"] == NEEDS
    entry = read_settings(tmp_path)[KEY]
    linears = {name for name, kind in found.kinds.items() if kind == "linear"}
    assert set(saved_without(entry)) == linears
    assert is_entry(entry)
    with pytest.raises(BiasCompensationError, match=r"21 of its linears.*detached before"):
        Compensation.load(tmp_path)
    other = crudely_quantized(tiny_model())
    with pytest.warns(UserWarning, match=r"21 linears.*quantized jointly"):
        note_saved_without(entry, other)
    assert joint_linears(other) == linears


def test_a_toolkits_config_follows_the_model(compensated):
    quantized, found = compensated

    class Config:
        bits = 3

    assert getattr(config_of(quantized, Config()), KEY) == found.entry()
    found.detach(quantized)
    assert saved_without(getattr(config_of(quantized, Config()), KEY))
    config = Config()
    assert config_of(tiny_model(), config) is config
    assert entry_to_save(tiny_model()) is None
