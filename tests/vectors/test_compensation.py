"""Vectors on disk, and all that must not pass in silence."""

import copy
import dataclasses
import json

import pytest
import torch
from helpers.language import crudely_quantized, tiny_model, token_batches
from helpers.vectors import logits, pair
from safetensors.torch import load_file, save_file

import bc_plugin
from bc_plugin import BiasCompensationError, Compensation
from bc_plugin.vectors.compensation import FILE


@pytest.mark.parametrize("positions", [0, 1, "all"])
def test_save_then_load_gives_the_same_logits(tmp_path, positions):
    quantized, compensation = pair(positions=positions)
    path = compensation.save(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name] == [FILE]
    loaded = Compensation.load(tmp_path)
    assert loaded.positions == compensation.positions
    for name, errors in compensation.errors.items():
        assert loaded.errors[name].after == pytest.approx(errors.after, rel=1e-3)
    twin = copy.deepcopy(quantized)
    compensation.attach(quantized)
    loaded.attach(twin)
    assert torch.equal(logits(twin), logits(quantized))


def test_vectors_that_cannot_be_written_leave_no_file(tmp_path, monkeypatch):
    _, compensation = pair()
    compensation.save(tmp_path)
    before = (tmp_path / FILE).read_bytes()

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("bc_plugin.vectors.compensation.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        compensation.save(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [FILE]
    assert (tmp_path / FILE).read_bytes() == before


def test_vectors_take_two_bytes_unless_they_do_not_fit():
    quantized, compensation = pair()
    assert {v.dtype for v in compensation.vectors.values()} == {torch.float16}
    model = tiny_model()
    model.model.embed_tokens.weight.data.mul_(1e6)
    quantized = crudely_quantized(model)
    large = bc_plugin.compensate(quantized, model, token_batches())
    model.model.layers[0].mlp.down_proj.weight.data.mul_(1e6)
    large = bc_plugin.compensate(quantized, model, token_batches())
    assert large.vectors["model.layers.0.mlp.down_proj"].dtype == torch.float32
    assert all(torch.isfinite(v).all() for v in large.vectors.values())


# Everything that must not pass in silence


def test_vectors_of_another_model_are_refused():
    _, compensation = pair()
    other = crudely_quantized(tiny_model(seed=1))
    with pytest.raises(BiasCompensationError, match="digest"):
        compensation.attach(other)


def test_vectors_of_another_architecture_are_refused():
    _, compensation = pair()
    with pytest.raises(BiasCompensationError, match="no module"):
        compensation.attach(crudely_quantized(tiny_model("opt")))


def test_requantized_weights_are_refused():
    quantized, compensation = pair()
    weight = quantized.model.layers[2].self_attn.v_proj.weight
    weight.data += 0.05 * (torch.rand_like(weight) < 0.2)
    with pytest.raises(BiasCompensationError, match="digest"):
        compensation.attach(quantized)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_vectors_that_are_not_finite_are_refused(value):
    quantized, compensation = pair()
    compensation.vectors["model.layers.1"][0, 3] = value
    with pytest.raises(BiasCompensationError, match=r"model\.layers\.1\.bias_compensation .* NaN"):
        compensation.attach(quantized)


def test_a_vector_of_the_wrong_shape_is_refused():
    quantized, compensation = pair()
    name = "model.layers.0.mlp.down_proj"
    compensation.vectors[name] = compensation.vectors[name][:, :-1]
    with pytest.raises(BiasCompensationError, match=r"shape \(2, 31\), expected \(2, 32\)"):
        compensation.attach(quantized)


def _rewrite(folder, change_tensors=None, change_entry=None):
    from safetensors import safe_open

    path = folder / FILE
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        entry = json.loads(file.metadata()["bias_compensation"])
    (change_tensors or (lambda tensors: None))(tensors)
    (change_entry or (lambda entry: None))(entry)
    save_file(tensors, path, metadata={"bias_compensation": json.dumps(entry)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"change_tensors": lambda t: t.pop("model.layers.1.bias_compensation")},
            r"missing, the first is model\.layers\.1\.bias_compensation",
        ),
        (
            {"change_tensors": lambda t: t.update({"x.bias_compensation": torch.zeros(2, 3)})},
            r"x\.bias_compensation, which its bias_compensation entry does not announce",
        ),
        ({"change_entry": lambda e: e.update(format_version=99)}, "format version 99"),
        ({"change_entry": lambda e: e.pop("positions")}, "damaged"),
        ({"change_entry": lambda e: e.update(sites=3)}, "damaged"),
    ],
    ids=["missing", "unknown", "newer", "incomplete", "nonsense"],
)
def test_a_damaged_file_is_refused(tmp_path, changes, message):
    _, compensation = pair()
    compensation.save(tmp_path)
    _rewrite(tmp_path, **changes)
    with pytest.raises(BiasCompensationError, match=message):
        Compensation.load(tmp_path)


def test_a_folder_without_compensation_is_refused(tmp_path):
    with pytest.raises(BiasCompensationError, match="holds no compensation"):
        Compensation.load(tmp_path)


def test_describe_lists_every_site():
    _, compensation = pair()
    rows = compensation.describe()
    assert len(rows) == 3 * 8
    assert {row["shape"][0] for row in rows} == {2}
    assert sum(row["bytes"] for row in rows) == compensation.nbytes
    assert all(dataclasses.is_dataclass(e) for e in compensation.errors.values())
