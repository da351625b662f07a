"""What is no whole GGUF file is refused by name."""

import numpy as np
import pytest
from helpers.gguf_files import tiny, write_file

from bc_plugin import BiasCompensationError
from bc_plugin.gguf.file import GGUFFile, is_gguf
from bc_plugin.gguf.places import places_in

LINEARS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_file(tmp_path_factory.mktemp("file") / "model.gguf", tiny(), "Q4_0")


def test_metadata_and_types(path):
    file = GGUFFile(path)
    assert file.architecture == "llama"
    assert file.setting("block_count") == 3
    assert file.types() == {"Q4_0": 21, "F32": 9}
    assert not file.is_float
    assert is_gguf("a/b.GGUF") and not is_gguf("a.gguf/b")


@pytest.mark.parametrize("share", [0.001, 0.02, 0.5, 0.99])
def test_a_truncated_file(path, tmp_path, share):
    whole = path.read_bytes()
    part = tmp_path / "part.gguf"
    part.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(BiasCompensationError, match=r"part.gguf is no GGUF file, or is damaged"):
        GGUFFile(part)


def test_no_file(tmp_path):
    with pytest.raises(BiasCompensationError, match=r"there is no file .*none.gguf"):
        GGUFFile(tmp_path / "none.gguf")
    (tmp_path / "text.gguf").write_text("no model at all")
    with pytest.raises(BiasCompensationError, match="is no GGUF file"):
        GGUFFile(tmp_path / "text.gguf")


def test_a_part_of_a_split_file(tmp_path):
    path = write_file(tmp_path / "model-00001-of-00003.gguf", tiny(), split__count=3)
    with pytest.raises(BiasCompensationError, match=r"one of 3 parts.*llama-gguf-split --merge"):
        GGUFFile(path)


def test_an_architecture_that_is_not_in_the_table(tmp_path):
    path = write_file(tmp_path / "model.gguf", tiny("granite"))
    with pytest.raises(BiasCompensationError, match=r"architecture 'granite'.*Known are \['gemma2"):
        places_in(GGUFFile(path))


def test_a_mixture_of_experts(tmp_path):
    path = write_file(tmp_path / "model.gguf", tiny(), llama__expert_count=8)
    with pytest.raises(BiasCompensationError, match="mixture of experts"):
        places_in(GGUFFile(path))


def test_q_and_k_have_the_converters_order(path):
    """Halves of a head, of 8 values here, are interleaved: llama.cpp rotates neighbours."""
    places = places_in(GGUFFile(path))
    stored = places.stored("blk.0.attn_q.bias", np.arange(32.0))
    assert stored[:8].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert places.read("blk.0.attn_q.bias", stored).tolist() == list(range(32))
    assert places.stored("blk.0.attn_k.bias", np.arange(16.0))[8:10].tolist() == [8, 12]
    assert places.stored("blk.0.attn_v.bias", np.arange(16.0)).tolist() == list(range(16))


def test_what_has_no_place_is_told(path, tmp_path):
    linears = [f"model.layers.{n}.{name}" for n in (0, 1) for name in LINEARS]
    assert places_in(GGUFFile(path)).left(linears) == []
    other = places_in(GGUFFile(write_file(tmp_path / "qwen2.gguf", tiny("qwen2"))))
    mlp = [f"model.layers.{n}.{name}" for n in (0, 1) for name in LINEARS[1:]]
    assert other.left(linears) == [*mlp, "model.layers.0"]
