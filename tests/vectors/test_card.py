"""The model card says what a checkpoint needs."""

import json

import pytest

from bc_plugin import BiasCompensationError, write_card
from bc_plugin.names import KEY
from bc_plugin.vectors.sealed import seal


def _checkpoint(folder, joint):
    entry = {"format_version": 2, "joint": joint, "digest": "0"}
    settings = seal({"bits": 3, "quant_method": "gptq", KEY: entry})
    (folder / "config.json").write_text(json.dumps({"quantization_config": settings}))
    return folder


@pytest.mark.parametrize("joint", [True, False])
def test_it_says_how_to_load_and_what_happens_otherwise(tmp_path, joint):
    text = write_card(_checkpoint(tmp_path, joint)).read_text()
    assert "GPTQ, 3 bits" in text and "bc_plugin.enable()" in text and "bc-plugin run --" in text
    assert ("refuse them" in text) == joint
    assert ("less accurate" in text) != joint


def test_a_card_that_is_there_stays(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    assert write_card(_checkpoint(tmp_path, True)).read_text() == "mine"


def test_a_folder_without_a_compensated_checkpoint_is_refused(tmp_path):
    with pytest.raises(BiasCompensationError, match="no compensated checkpoint"):
        write_card(tmp_path)
    assert not (tmp_path / "README.md").exists()
