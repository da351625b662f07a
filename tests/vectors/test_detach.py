"""Vectors are taken out of what they are in, whatever is around it, and of nothing else."""

import copy
from types import SimpleNamespace

import pytest
import torch
from helpers.vectors import logits, pair
from torch import nn

from bc_plugin import BiasCompensationError, Compensation


class Wrapper(nn.Module):
    """As PEFT and GPTQModel put them around a model."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)


WRAPPERS = {
    "a module": Wrapper,
    "two modules": lambda model: Wrapper(Wrapper(model)),
    "no module": lambda model: SimpleNamespace(model=model),
}


@pytest.mark.parametrize("kind", WRAPPERS)
def test_through_a_wrapper(kind):
    model, compensation = pair()
    state = copy.deepcopy(model.state_dict())
    compensation.attach(model)
    wrapped = WRAPPERS[kind](model)
    assert Compensation.attached_to(wrapped) is compensation
    Compensation.attached_to(wrapped).detach(wrapped)
    assert Compensation.attached_to(model) is None
    after = model.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in state.items())


def test_other_vectors_for_the_same_weights_are_not_attached():
    model, compensation = pair()
    compensation.attach(model)
    expected = logits(model)
    vectors = {name: 2 * vectors for name, vectors in compensation.vectors.items()}
    with pytest.raises(BiasCompensationError, match="these vectors are not attached"):
        compensation.replaced(vectors=vectors).detach(model)
    assert torch.equal(logits(model), expected)
    compensation.detach(model)
    with pytest.raises(BiasCompensationError, match="which has none"):
        compensation.detach(model)


def test_loaded_vectors_detach_what_they_were_saved_from(tmp_path):
    model, compensation = pair()
    expected = logits(model)
    compensation.attach(model)
    compensation.save(tmp_path)
    Compensation.load(tmp_path).detach(model)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("failing", ["AttachedSite", "Tracking", "entry_of"])
def test_attaching_fails_whole(monkeypatch, failing):
    model, compensation = pair()
    expected, state = logits(model), copy.deepcopy(model.state_dict())
    from bc_plugin.vectors import attach

    own, calls = getattr(attach, failing), []

    def fails(*args):
        calls.append(args)
        if len(calls) == 3 or failing != "AttachedSite":
            raise MemoryError
        return own(*args)

    monkeypatch.setattr(attach, failing, fails)
    with pytest.raises(MemoryError):
        compensation.attach(model)
    assert Compensation.attached_to(model) is None
    assert model.state_dict().keys() == state.keys()
    assert torch.equal(logits(model), expected)
    monkeypatch.undo()
    compensation.attach(model)


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_vectors_in_place_make_no_other_weights(architecture):
    model, compensation = pair(architecture)
    compensation.attach(model)
    compensation.check(model)
