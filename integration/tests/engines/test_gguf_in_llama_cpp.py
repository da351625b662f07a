"""Compensated GGUF files in llama.cpp (``make test-llama-cpp`` fetches it)."""

import pytest
import torch
from transformers import AutoModelForCausalLM

pytest.importorskip("gguf", reason="needs the gguf extra")

from rig.engines import with_llama_cpp

import bc_plugin
from bc_plugin import BiasCompensationError
from bc_plugin.gguf.file import GGUFFile
from bc_plugin.gguf.load import load_model
from bc_plugin.gguf.places import places_in
from bc_plugin.gguf.verify import llama_cpp_logits, verify
from bc_plugin.gguf.write import write_compensated

if not (with_llama_cpp.PACKAGES / "llama_cpp").exists():
    pytest.skip("needs llama.cpp: make setup-llama-cpp", allow_module_level=True)

from rig.subjects.tiny_gguf import PIECES, SHAPES, tiny_float

KINDS = ("Q2_K", "Q3_K_M", "Q4_K_M")
CALIBRATION = {"positions": 0, "dtype": "float32"}


@pytest.fixture(autouse=True)
def _llama_cpp(monkeypatch):
    monkeypatch.syspath_prepend(with_llama_cpp.PACKAGES)


@pytest.fixture(scope="module", params=SHAPES)
def folder(request, tmp_path_factory):
    """A float model, and GGUF files of it as llama.cpp quantizes them."""
    folder = tiny_float(tmp_path_factory.mktemp("gguf") / request.param, request.param)
    for kind in KINDS:
        with_llama_cpp.quantize(folder / "model.gguf", folder / f"{kind}.gguf", kind)
    return folder


def _tokens(count, length=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, PIECES, (count, length), generator=generator)


def _float(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def _logits(model, ids, compensation=None):
    if compensation is not None:
        compensation.attach_unchecked(model)
    logits = model(input_ids=ids).logits
    if compensation is not None:
        compensation.detach(model)
    return logits


def _compensated(folder, kind, strength=1.0):
    """The file, its model, and its compensation; vectors ``strength`` times what they should be."""
    source, reference = GGUFFile(folder / f"{kind}.gguf"), _float(folder)
    model, places = load_model(source, config=reference.config), places_in(source)
    calibration = [{"input_ids": _tokens(2, seed=seed)} for seed in range(4)]
    found = bc_plugin.compensate(
        model, reference, calibration, CALIBRATION, only=places.__contains__
    )
    vectors = {name: strength * vector for name, vector in found.vectors.items()}
    return source, model, found.replaced(vectors=vectors)


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_adds_every_vector(folder, kind, tmp_path):
    # So strong that llama.cpp's rounding of activations to 8 bits is little beside them.
    source, model, strong = _compensated(folder, kind, strength=8.0)
    kept = write_compensated(source, tmp_path / "out.gguf", strong)
    ids = _tokens(3, seed=9)
    plain, expected = _logits(model, ids), _logits(model, ids, kept)
    theirs = llama_cpp_logits(tmp_path / "out.gguf", ids)
    rounding = (llama_cpp_logits(source.path, ids) - plain).norm()
    apart, effect = (theirs - expected).norm(), (plain - expected).norm()
    print(
        f"{folder.name} {kind}: {len(kept.vectors)} vectors move logits by {effect:.1f}, of "
        f"{plain.norm():.1f}; apart {apart:.1f}, without vectors {rounding:.1f}"
    )
    assert apart < 0.2 * effect
    assert apart < 2 * rounding


def test_each_vector_counts(folder, tmp_path):
    """Without any one kind of site, llama.cpp's logits are further from the plugin's."""
    source, model, strong = _compensated(folder, "Q4_K_M", strength=8.0)
    write_compensated(source, tmp_path / "out.gguf", strong)
    ids = _tokens(3, seed=9)
    theirs = llama_cpp_logits(tmp_path / "out.gguf", ids)
    apart = (theirs - _logits(model, ids, strong)).norm()
    kinds = {_kind(name) for name in strong.vectors}
    assert len(kinds) == (7 if folder.name == "llama" else 4)
    for kind in kinds:
        others = [name for name in strong.vectors if _kind(name) != kind]
        without = (theirs - _logits(model, ids, strong.only(others))).norm()
        print(f"{folder.name}: apart {apart:.1f}, without {kind} {without:.1f}")
        assert without > 1.2 * apart, kind


def _kind(site):
    """``self_attn.q_proj`` and the like; a block's is ``block``."""
    return site.split(".", 3)[3] if site.count(".") > 2 else "block"


def test_a_wrong_order_of_channels_is_found(folder, tmp_path, monkeypatch):
    if folder.name != "llama":
        pytest.skip("its q and k are not permuted")
    source, model, strong = _compensated(folder, "Q4_K_M", strength=8.0)
    strong = strong.only([name for name in strong.vectors if _kind(name) == "self_attn.q_proj"])
    monkeypatch.setattr("bc_plugin.gguf.places.Places.stored", lambda self, tensor, bias: bias)
    monkeypatch.setattr("bc_plugin.gguf.places.Places.read", lambda self, tensor, bias: bias)
    kept = write_compensated(source, tmp_path / "out.gguf", strong)
    with pytest.raises(BiasCompensationError, match="other logits"):
        verify(source, tmp_path / "out.gguf", model, kept)
