"""Compensated GGUF files in llama.cpp (``make test-llama-cpp`` fetches it)."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

pytest.importorskip("gguf", reason="needs the gguf extra")
pytest.importorskip("gptqmodel", reason="needs the current environment's tokenizers")

from rig.engines import with_llama_cpp

import bc_plugin
from bc_plugin import BiasCompensationError
from bc_plugin.cli import app
from bc_plugin.gguf.compensated import compensation_in
from bc_plugin.gguf.file import GGUFFile, control_of
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
    assert len(kinds) == {"llama": 7, "nemotron": 6}.get(folder.name, 4)
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


def test_node_llama_cpp_reads_the_file_too(folder, tmp_path):
    if folder.name != "llama":
        pytest.skip("node-llama-cpp takes no control vectors")
    source, _, strong = _compensated(folder, "Q4_K_M", strength=8.0)
    write_compensated(source, tmp_path / "out.gguf", strong)
    ids = _tokens(2, seed=9)
    out, rows = tmp_path / "out.gguf", ids.tolist()
    found = torch.tensor(with_llama_cpp.log_probabilities_of_file(out, rows, tmp_path))
    ours = llama_cpp_logits(out, ids)[:, :-1].log_softmax(-1)
    expected = ours.gather(-1, ids[:, 1:, None]).squeeze(-1)
    assert (found - expected).norm() < 0.02 * expected.norm()


def test_the_http_server_answers_with_the_vectors(folder, tmp_path):
    if folder.name != "llama":
        pytest.skip("llama-cpp-python's server takes no control vectors")
    source, model, strong = _compensated(folder, "Q4_K_M", strength=8.0)
    write_compensated(source, tmp_path / "out.gguf", strong)
    with with_llama_cpp.served(tmp_path / "out.gguf") as ask:
        prompt = "to those that are near"
        ids = ask("/extras/tokenize", {"input": prompt})["tokens"]
        plain, expected = (_logits(model, torch.tensor([ids]), c)[0, -1] for c in (None, strong))
        words = [
            ask("/extras/detokenize", {"tokens": [int(logits.argmax())]})["text"]
            for logits in (expected, plain)
        ]
        asked = {"prompt": prompt, "max_tokens": 1, "temperature": 0.0}
        found = ask("/v1/completions", asked)["choices"][0]["text"]
    print(f"{found!r}, expected {words[0]!r}, without vectors {words[1]!r}")
    assert words[0] != words[1]
    assert found == words[0]


def _run(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def _named(folder):
    """FLOAT, as a command is given it."""
    # Of a Qwen2, transformers makes another tokenizer than the files say.
    return folder / "model.gguf" if "qwen2" in (folder / "config.json").read_text() else folder


def test_the_command_line(folder, tmp_path):
    data = ("--dataset", folder / "text.txt", "--length", 48, "--samples", 8)
    out, refined = tmp_path / "out.gguf", tmp_path / "new.gguf"
    said = _run("compensate", folder / "Q2_K.gguf", _named(folder), out, *data)
    assert f"{out}: loaded by llama.cpp" in said.replace("\n", "")
    control = folder.name not in ("llama", "nemotron")
    assert (f"--control-vector {control_of(out)}" in said) == control
    assert control_of(out).exists() == control
    left = "model.layers.[0-2].mlp.down_proj, model.layers.[0];"
    assert (left in said) == control

    _run("refine", out, _named(folder), refined, *data, "--steps", 2)
    assert compensation_in(GGUFFile(refined)).refined["steps"] == 2
    assert "Refined by model in 2 steps" in _run("inspect", refined).replace("\n", " ")

    measure = ("--dataset", folder / "text.txt", "--length", 48, "--tokens", 480, "--json")
    measured = [
        json.loads(_run("evaluate", path, "--reference", _named(folder), *measure))["kl"]
        for path in (folder / "Q2_K.gguf", out, refined)
    ]
    assert measured[2] < measured[0] and measured[2] < measured[1]
    expected = ["new.control.gguf", "new.gguf", "out.control.gguf", "out.gguf"]
    found = sorted(path.name for path in tmp_path.iterdir())
    assert found == [name for name in expected if control or "control" not in name]


def test_another_models_float_is_refused(folder, tmp_path):
    other = tiny_float(tmp_path / "other", folder.name, seed=1)
    data = ("--dataset", folder / "text.txt", "--length", 48, "--samples", 8)
    with pytest.raises(BiasCompensationError, match="float model"):
        _run("compensate", folder / "Q4_K_M.gguf", _named(other), tmp_path / "out.gguf", *data)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_a_float_file_will_do_where_its_metadata_say_enough(folder, tmp_path):
    if folder.name in ("nemotron", "gemma2"):
        pytest.skip("the others show both cases")
    data = ("--dataset", folder / "text.txt", "--length", 48, "--samples", 8)
    files = folder / "Q4_K_M.gguf", folder / "model.gguf", tmp_path / "out.gguf"
    if folder.name in ("llama", "qwen2"):
        assert "loaded by llama.cpp" in _run("compensate", *files, *data).replace("\n", "")
        return
    # transformers does not read the width of Qwen3's heads, nor the scale of Gemma's attention.
    with pytest.raises(BiasCompensationError, match=r"is not read by|gives other logits with"):
        _run("compensate", *files, *data)
    assert list(tmp_path.iterdir()) == []
