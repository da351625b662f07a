"""Vectors are bound to their checkpoint: whatever was changed of them is noticed."""

import pytest
import torch
from helpers.vectors import pair
from safetensors.torch import load_file, save_file

from bc_plugin import BiasCompensationError, Compensation
from bc_plugin.names import KEY
from bc_plugin.vectors.short_names import expand

DAMAGES = {
    "one value": lambda t: t[0].view(-1)[3].add_(1e-3),
    "zeros": lambda t: t[0].zero_(),
    "two sites swapped": lambda t: t.insert(0, t.pop(1)),
    "two rows swapped": lambda t: t[0].copy_(t[0].flip(0)),
}


@pytest.fixture
def saved(tmp_path):
    model, compensation = pair(positions=1)
    return model, compensation, compensation.save(tmp_path)


def _rewrite(path, change):
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata=metadata)


@pytest.mark.parametrize("damage", DAMAGES)
def test_changed_vectors_are_refused(saved, damage):
    _, _, path = saved

    def change(tensors):
        shape = next(iter(tensors.values())).shape
        names = [name for name, tensor in tensors.items() if tensor.shape == shape]
        values = [tensors[name].clone() for name in names]
        DAMAGES[damage](values)
        tensors.update(zip(names, (v.contiguous() for v in values), strict=True))

    _rewrite(path, change)
    with pytest.raises(
        BiasCompensationError, match="are not those that the bias_compensation entry"
    ):
        Compensation.load(path.parent)


def test_another_type_is_refused(saved):
    _, _, path = saved
    _rewrite(path, lambda t: t.update({name: v.double() for name, v in t.items()}))
    with pytest.raises(BiasCompensationError, match="are not those"):
        Compensation.load(path.parent)


def test_a_width_that_would_broadcast_is_refused():
    model, compensation = pair(positions=1)
    block = compensation.blocks[0] + ".0"
    wrong = compensation.replaced(
        vectors={**compensation.vectors, block: compensation.vectors[block][:, :1]}
    )
    with pytest.raises(BiasCompensationError, match=rf"{block}\.{KEY} has shape \(2, 1\)"):
        wrong.attach(model)


def test_a_model_that_was_cast_saves_what_was_attached():
    model, compensation = pair(positions=1)
    compensation.attach(model)
    state = model.to(torch.bfloat16).state_dict()
    for name, vectors in compensation.vectors.items():
        assert torch.equal(state[f"{name}.{KEY}"], vectors)


def test_the_first_format_is_refused_by_name(saved):
    _, compensation, _ = saved
    entry = {**compensation.entry(), "format_version": 1}
    with pytest.raises(BiasCompensationError, match="format version 1, of a development version"):
        Compensation.from_entry(entry, compensation.vectors)


@pytest.mark.parametrize("short", ["layers.[0-999999999]", "layers.[5-2]"])
def test_names_without_end_are_refused(short):
    with pytest.raises(ValueError, match="stands for"):
        expand(short)
