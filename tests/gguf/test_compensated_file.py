"""Compensated GGUF files: what is in them, what is read of them, and what is refused."""

import json

import gguf
import numpy as np
import pytest
import torch
from helpers.gguf_files import calibration, tiny, write_file
from transformers import AutoModelForCausalLM

import bc_plugin
from bc_plugin import BiasCompensationError, Compensation
from bc_plugin.gguf.compensated import compensation_in
from bc_plugin.gguf.file import GGUFFile, control_of
from bc_plugin.gguf.load import load_model
from bc_plugin.gguf.places import places_in
from bc_plugin.gguf.verify import verify
from bc_plugin.gguf.write import write_compensated
from bc_plugin.names import KEY

SETTINGS = {"positions": 0, "dtype": "float32"}


class Case:
    """A float model, its file in Q4_0, and what compensates that."""

    def __init__(self, folder, architecture):
        self.folder, self.float_model = folder, tiny(architecture)
        self.source = GGUFFile(write_file(folder / "q4_0.gguf", self.float_model, "Q4_0"))
        self.model = load_model(self.source)
        self.compensation = self.computed(calibration())
        self.out = folder / "out.gguf"
        self.kept = write_compensated(self.source, self.out, self.compensation)

    def computed(self, data, **settings):
        only = places_in(self.source).__contains__
        settings = {**SETTINGS, **settings}
        return bc_plugin.compensate(self.model, self.float_model, data, settings, only=only)


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def case(request, tmp_path_factory):
    return Case(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory):
    return Case(tmp_path_factory.mktemp("qwen2"), "qwen2")


@torch.no_grad()
def _logits(model):
    return model(**calibration(1, seed=9)[0]).logits


def test_a_float_file_is_the_float_model(tmp_path):
    model = tiny("llama")
    again = load_model(GGUFFile(write_file(tmp_path / "f32.gguf", model)))
    torch.testing.assert_close(_logits(again), _logits(model), rtol=0, atol=1e-5)


def test_sites_are_those_with_a_place(case):
    kinds = list(case.compensation.kinds.values())
    assert (kinds.count("linear"), kinds.count("block")) == (
        (18, 3) if case.source.architecture == "llama" else (9, 2)
    )


def test_tensors_are_copied_byte_for_byte(case):
    written, biases = GGUFFile(case.out), set(places_in(case.source).biases.values())
    for name, tensor in case.source.tensors.items():
        if name not in biases:
            assert written.tensors[name].tensor_type == tensor.tensor_type
            assert written.tensors[name].data.tobytes() == tensor.data.tobytes()
    added = set(written.tensors) - set(case.source.tensors)
    assert added <= biases
    assert len(added) == (21 if case.source.architecture == "llama" else 0)
    for key, field in case.source.reader.fields.items():
        if not key.startswith("GGUF."):
            assert written.value(key) == field.contents()


def test_vectors_are_read_back(case):
    again = compensation_in(GGUFFile(case.out))
    assert again.entry() == case.kept.entry()
    for name, vector in case.compensation.vectors.items():
        torch.testing.assert_close(again.vectors[name], vector, rtol=1e-5, atol=1e-6)


def test_a_bias_that_was_there_is_the_sum(qwen2):
    name, site = "blk.1.attn_k.bias", "model.layers.1.self_attn.k_proj"
    own = qwen2.float_model.get_submodule(site).bias.detach()
    stored = torch.tensor(np.array(GGUFFile(qwen2.out).tensors[name].data))
    vector = qwen2.compensation.vectors[site][0]
    assert own.any() and vector.any()
    torch.testing.assert_close(stored, own + vector)


def test_the_model_of_a_compensated_file_has_no_vectors(case):
    model = load_model(GGUFFile(case.out))
    assert torch.equal(_logits(model), _logits(case.model))


def test_it_is_compared_in_transformers_where_llama_cpp_is_missing(case):
    assert "transformers" in verify(case.source, case.out, case.model, case.kept)


def test_a_wrong_vector_is_found(case, tmp_path):
    vectors = {name: -3 * vector for name, vector in case.kept.vectors.items()}
    wrong = case.kept.replaced(vectors=vectors)
    write_compensated(case.source, tmp_path / "out.gguf", wrong)
    with pytest.raises(BiasCompensationError, match="other logits"):
        verify(case.source, tmp_path / "out.gguf", case.model, case.kept)


def test_a_second_compensation_replaces_the_first(case, tmp_path):
    other = case.computed(calibration(seed=5))
    write_compensated(case.source, tmp_path / "once.gguf", other)
    write_compensated(GGUFFile(case.out), tmp_path / "twice.gguf", other)
    once, twice = (GGUFFile(tmp_path / f"{name}.gguf") for name in ("once", "twice"))
    assert once.digest() == twice.digest()
    assert once.value(KEY) == twice.value(KEY)


def test_fewer_vectors_take_the_others_out(case, tmp_path):
    few = case.compensation.only(list(case.compensation.vectors)[:2])
    write_compensated(GGUFFile(case.out), tmp_path / "few.gguf", few)
    write_compensated(case.source, tmp_path / "once.gguf", few)
    assert GGUFFile(tmp_path / "few.gguf").digest() == GGUFFile(tmp_path / "once.gguf").digest()
    assert list(compensation_in(GGUFFile(tmp_path / "few.gguf")).vectors) == list(few.vectors)


def test_the_control_vector_is_llama_cpps(qwen2):
    control = GGUFFile(control_of(qwen2.out))
    assert control.architecture == "controlvector"
    assert control.value("controlvector.model_hint") == "qwen2"
    assert list(control.tensors) == ["direction.1", "direction.2"]
    expected = qwen2.compensation.vectors["model.layers.2"][0].numpy()
    assert control.tensors["direction.2"].tensor_type.name == "F32"
    assert np.array_equal(control.tensors["direction.2"].data, expected)


def test_without_its_control_vector_a_file_is_refused(qwen2, tmp_path):
    (tmp_path / "out.gguf").write_bytes(qwen2.out.read_bytes())
    with pytest.raises(BiasCompensationError, match=r"out.control.gguf, which is not there"):
        compensation_in(GGUFFile(tmp_path / "out.gguf"))
    write_compensated(qwen2.source, tmp_path / "o.gguf", qwen2.computed(calibration(seed=5)))
    control_of(tmp_path / "o.gguf").rename(control_of(tmp_path / "out.gguf"))
    with pytest.raises(BiasCompensationError, match="control vector of another file"):
        compensation_in(GGUFFile(tmp_path / "out.gguf"))


@pytest.mark.parametrize("name", ["blk.1.ffn_up.weight", "blk.1.attn_q.bias", "output_norm.weight"])
def test_a_changed_tensor_is_found(case, tmp_path, name):
    (tmp_path / "out.gguf").write_bytes(case.out.read_bytes())
    if control_of(case.out).exists():
        control_of(tmp_path / "out.gguf").write_bytes(control_of(case.out).read_bytes())
    tensor = gguf.GGUFReader(tmp_path / "out.gguf", "r+").tensors
    (data,) = (tensor.data for tensor in tensor if tensor.name == name)
    data.reshape(-1).view(np.uint8)[5] ^= 64
    data.base.flush() if hasattr(data.base, "flush") else None
    with pytest.raises(BiasCompensationError, match=r"(tensors are not those|digest)"):
        compensation_in(GGUFFile(tmp_path / "out.gguf"))


def test_damaged_metadata(case, tmp_path):
    said = json.loads(GGUFFile(case.out).value(KEY))
    del said["bases"]
    path = write_file(tmp_path / "m.gguf", case.float_model, **{KEY: json.dumps(said)})
    with pytest.raises(BiasCompensationError, match="metadata 'bias_compensation' is damaged"):
        compensation_in(GGUFFile(path))


def test_a_file_without_vectors(case):
    assert compensation_in(case.source) is None


def test_vectors_without_a_place_are_refused(qwen2, tmp_path):
    everywhere = bc_plugin.compensate(qwen2.model, qwen2.float_model, calibration(), SETTINGS)
    with pytest.raises(BiasCompensationError, match=r"no place for .* the first is that of model"):
        write_compensated(qwen2.source, tmp_path / "out.gguf", everywhere)
    apart = qwen2.computed(calibration(), positions=1)
    with pytest.raises(BiasCompensationError, match="positions=0"):
        write_compensated(qwen2.source, tmp_path / "out.gguf", apart)
    assert not list(tmp_path.iterdir())


def test_a_bias_in_half_precision_is_refused(tmp_path):
    model = tiny("qwen2")
    path = write_file(tmp_path / "q.gguf", model)
    file = GGUFFile(path)
    compensation = Case(tmp_path, "qwen2").compensation
    tensor = file.tensors["blk.0.attn_q.bias"]
    halved = tensor._replace(tensor_type=gguf.GGMLQuantizationType.F16)
    file.tensors["blk.0.attn_q.bias"] = halved
    with pytest.raises(BiasCompensationError, match=r"attn_q.bias is stored as F16"):
        write_compensated(file, tmp_path / "o.gguf", compensation)


def test_another_models_float_is_refused(case):
    other = tiny(case.source.architecture, seed=1)
    with pytest.raises(BiasCompensationError, match="float model"):
        bc_plugin.compensate(
            case.model,
            other,
            calibration(),
            SETTINGS,
            only=places_in(case.source).__contains__,
        )
    wider = tiny(case.source.architecture, num_hidden_layers=2).config
    with pytest.raises(BiasCompensationError, match=r"block_count=3.*num_hidden_layers=2"):
        load_model(case.source, config=wider)


@pytest.mark.parametrize("positions", [0, 1])
def test_what_transformers_loads_is_compensated_in_memory(case, positions):
    path = case.source.path
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name).eval()
    plain, settings = _logits(model), {"positions": positions}
    compensation = bc_plugin.compensate(model, case.float_model, calibration(), settings)
    compensation.attach(model)
    assert not torch.equal(_logits(model), plain)
    Compensation.attached_to(model).detach(model)
    assert torch.equal(_logits(model), plain)


def test_a_config_with_more_weights_is_refused(case):
    config = tiny(case.source.architecture).config
    config.attention_bias = True  # Qwen2 has those of q, k and v whatever its config says
    if case.source.architecture == "llama":
        with pytest.raises(BiasCompensationError, match=r"no tensors for \['model.layers.0.self"):
            load_model(case.source, config=config)
    else:
        load_model(case.source, config=config)
