"""Compensating fails after a toolkit has quantized: what is left is a plain quantized model."""

import copy
from types import SimpleNamespace

import pytest
import torch
from helpers.language import crudely_quantized, tiny_model, token_batches
from torch import nn

from bc_plugin import BiasCompensationConfig, BiasCompensationError, Compensation
from bc_plugin.marks import mark_of
from bc_plugin.names import KEY
from bc_plugin.shift.rescaling import Rescaling
from bc_plugin.toolkits import run
from bc_plugin.toolkits.flag import set_flag


@pytest.fixture
def toolkit(monkeypatch):
    """Rounds linears in place, without the option's knowledge."""
    model = tiny_model()
    rounded = crudely_quantized(model).state_dict()
    settings = SimpleNamespace()
    set_flag(settings, {"positions": 1})
    model.config.quantization_config = {KEY: {"positions": 1}}  # as a toolkit writes what it has

    def quantize():
        run.calibration_is_ready(lambda: token_batches(), None, (), {})
        model.load_state_dict(rounded)
        return model

    def start(**changes):
        return run.run_compensated(
            quantize,
            model,
            BiasCompensationConfig(**changes),
            lambda result: result,
            lambda _, block: _rounded(block),
        )

    return SimpleNamespace(model=model, rounded=rounded, settings=settings, start=start)


@torch.no_grad()
def _rounded(block):
    for module in block.modules():
        if isinstance(module, nn.Linear):
            module.weight.sub_(0.01)
    return block


def _is_plain(toolkit):
    model = toolkit.model
    state = model.state_dict()
    assert list(state) == list(toolkit.rounded)
    assert all(torch.equal(state[name], tensor) for name, tensor in toolkit.rounded.items())
    assert Compensation.attached_to(model) is None
    assert KEY not in model.config.quantization_config
    for module in model.modules():
        assert "forward" not in vars(module) and not module._forward_hooks
        assert mark_of(module, Rescaling) is None


def test_it_is_compensated_where_nothing_fails(toolkit):
    toolkit.start()
    assert Compensation.attached_to(toolkit.model) is not None
    assert toolkit.model.config.quantization_config[KEY]["digest"]


@pytest.mark.parametrize("error", [BiasCompensationError("too few"), NotImplementedError("meta")])
def test_the_pass(toolkit, monkeypatch, error):
    def compensate(*args, **kwargs):
        raise error

    monkeypatch.setattr(run, "compensate", compensate)
    with pytest.raises(BiasCompensationError, match=r"is quantized.*(too few|meta)") as raised:
        toolkit.start()
    assert "saved and loaded" in str(raised.value) and raised.value.__cause__ is error
    assert raised.value.model is toolkit.model
    _is_plain(toolkit)


def test_refinement_after_the_pass(toolkit, monkeypatch):
    def train_vectors(*args, **kwargs):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(run, "train_vectors", train_vectors)
    with pytest.raises(BiasCompensationError, match="no memory"):
        toolkit.start(refine_steps=1, refine="block")
    _is_plain(toolkit)


def test_the_last_step(toolkit, monkeypatch):
    def entry_of(compensation):
        raise ValueError("no entry")

    monkeypatch.setattr("bc_plugin.vectors.attach.entry_of", entry_of)
    with pytest.raises(BiasCompensationError, match="no entry"):
        toolkit.start()
    _is_plain(toolkit)


def test_interrupted(toolkit, monkeypatch):
    def compensate(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "compensate", compensate)
    with pytest.raises(KeyboardInterrupt):
        toolkit.start()
    _is_plain(toolkit)


def test_jointly_quantized_weights_are_said_to_be(toolkit, monkeypatch):
    monkeypatch.setattr(run.CompensatedQuantization, "is_joint", True)
    monkeypatch.setattr(run, "compensate", None)
    with pytest.raises(BiasCompensationError, match="its linears at least"):
        toolkit.start()


def test_nothing_was_quantized_when_it_fails_before(toolkit, monkeypatch):
    before = copy.deepcopy(toolkit.model.state_dict())
    with pytest.raises(BiasCompensationError, match="longest calibration sequence") as raised:
        toolkit.start(positions=99)
    assert raised.value.model is None
    state = toolkit.model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())
    assert toolkit.settings.bias_compensation["positions"] == 1  # it may be tried again
