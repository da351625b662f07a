"""Requests and entries on the config objects of toolkits."""

from types import SimpleNamespace

import pytest
from helpers.language import crudely_quantized, tiny_model, token_batches

import bc_plugin
from bc_plugin import BiasCompensationConfig, BiasCompensationError
from bc_plugin.toolkits.flag import asked, asked_by, config_of, flag_of, set_flag

ENTRY = {"format_version": 1, "positions": 1, "digest": "0123456789abcdef"}


def _config(flag=None):
    config = SimpleNamespace(bits=4)
    set_flag(config, flag)
    return config


def test_an_entry_asks_for_nothing_and_quantizing_with_it_is_refused():
    config = _config(ENTRY)
    assert flag_of(config) is None
    for ask in (lambda: asked(ENTRY), lambda: asked_by(config), lambda: asked_by(config, {})):
        with pytest.raises(BiasCompensationError, match=r"digest 01234567.* pass True, a dict"):
            ask()


@pytest.mark.parametrize("flag", [True, {"positions": 2}, BiasCompensationConfig()])
def test_asking_leaves_the_config_as_it_is(flag):
    config = _config(flag)
    before = dict(vars(config))
    assert asked_by(config) == asked_by(config, {}) == BiasCompensationConfig.parse(flag)
    assert vars(config) == before


@pytest.mark.parametrize("flag", [None, True, ENTRY])
def test_the_keyword_of_quantize_goes_first(flag):
    config, kwargs = _config(flag), {"bias_compensation": {"positions": 3}, "batch_size": 1}
    before = dict(vars(config))
    assert asked_by(config, kwargs) == BiasCompensationConfig(positions=3)
    assert asked_by(config, {"bias_compensation": False}) is None
    assert kwargs == {"batch_size": 1}
    assert vars(config) == before


def test_the_config_of_a_model_has_its_entry_and_the_users_still_asks():
    model = tiny_model()
    quantized = crudely_quantized(model)
    user = _config({"positions": 0})
    without = config_of(quantized, user)
    assert not hasattr(without, "bias_compensation")
    assert without.bits == 4
    compensation = bc_plugin.compensate(quantized, model, token_batches())
    compensation.attach(quantized)
    for config in (user, _config()):
        answered = config_of(quantized, config)
        assert answered.bias_compensation == compensation.entry()
        assert flag_of(answered) is None
    assert asked_by(user) == BiasCompensationConfig(positions=0)


def test_a_config_without_a_flag_is_not_even_copied():
    config = _config()
    assert config_of(tiny_model(), config) is config
