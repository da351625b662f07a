"""Settings: what is taken, what is refused, and that they survive as JSON."""

import ast
from dataclasses import fields
from pathlib import Path

import pytest

import bc_plugin
from bc_plugin import BiasCompensationConfig, BiasCompensationError


@pytest.mark.parametrize("value", [None, False])
def test_no_flag_means_no_config(value):
    assert BiasCompensationConfig.parse(value) is None


def test_a_config_survives_its_dict():
    config = BiasCompensationConfig(positions="all", sites="block", keep_only_if_better=True)
    assert BiasCompensationConfig.parse(config.to_dict()) == config
    assert BiasCompensationConfig.parse(True) == BiasCompensationConfig()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"positions": -1}, "positions=-1"),
        ({"positions": True}, "positions=True"),
        ({"positions": "some"}, "positions='some'"),
        ({"sites": ("attention",)}, "sites="),
        ({"sites": ()}, "sites="),
        ({"held_out": 1.0}, "held_out=1.0"),
        ({"held_out": 0, "keep_only_if_better": True}, "held_out=0"),
        ({"batch_tokens": 0}, "batch_tokens=0"),
        ({"max_tokens": "8192"}, "max_tokens='8192'"),
        ({"joint": "false"}, "joint='false'"),  # a string that would count as true
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"position": 1}, r"unknown keys \['position'\]"),
        ("yes", "of type str"),
    ],
)
def test_a_wrong_flag_is_refused(value, message):
    with pytest.raises(BiasCompensationError, match=message):
        BiasCompensationConfig.parse(value)


@pytest.mark.parametrize("blocks", [[], [1], 1])
def test_settings_that_name_no_path_are_refused(blocks):
    with pytest.raises(BiasCompensationError, match="path of a list of blocks"):
        BiasCompensationConfig(blocks=blocks)


def test_several_paths_survive_as_json():
    config = BiasCompensationConfig(blocks=["model.encoder.layers", "model.decoder.layers"])
    assert BiasCompensationConfig.parse(config.to_dict()) == config


def test_the_modifier_has_every_setting():
    """Read from its source, since llm-compressor has an environment of its own."""
    source = Path(bc_plugin.__file__).parent / "llmcompressor" / "modifier.py"
    (modifier,) = (n for n in ast.parse(source.read_text()).body if isinstance(n, ast.ClassDef))
    own = {node.target.id for node in modifier.body if isinstance(node, ast.AnnAssign)}
    assert {field.name for field in fields(BiasCompensationConfig)} <= own
