"""Scales and norms that are trained, beside vectors or alone."""

import copy

import pytest
import torch
from helpers.grouped import GroupedLinear, grouped
from helpers.language import crudely_quantized, tiny_model, token_batches
from helpers.refinement import CALIBRATION, SETTINGS, compensated, refine
from torch import nn

import bc_plugin
from bc_plugin import (
    BiasCompensationConfig,
    BiasCompensationError,
    Compensation,
    RefinementConfig,
)
from bc_plugin.models.integers import integer_weights
from bc_plugin.refinement.train import Training
from bc_plugin.refinement.weights import NormForward, ScaledForward, norms_of

RATES = {"scales_learning_rate": 1e-2, "norms_learning_rate": 1e-2}


def _compensated(architecture="llama", **settings):
    model = tiny_model(architecture)
    quantized = grouped(model, bits=2, **settings)
    config = {"positions": 1, "held_out": 0}
    bc_plugin.compensate(quantized, model, CALIBRATION, config).attach(quantized)
    return model, quantized


def _tensors(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@torch.no_grad()
def _logits(model):
    return model(**token_batches(1, seed=5)[0]).logits


@pytest.mark.parametrize("settings", [{}, {"shuffled": True}, {"group_size": 6}])
def test_the_gradient_of_scales_is_that_of_the_weight_written_out(settings):
    torch.manual_seed(0)
    block = nn.ModuleDict({"linear": GroupedLinear(nn.Linear(20, 12).double(), **settings)})
    weight = integer_weights(block, ["linear"], copy.deepcopy, torch.float64)["linear"]
    forward = ScaledForward(block["linear"], weight)
    inputs = torch.randn(2, 5, 20, dtype=torch.float64, requires_grad=True)
    target = torch.randn(2, 5, 12).double()

    def gradients(output):
        return torch.autograd.grad((output * target).sum(), [inputs, forward.scales.step])

    found = block["linear"](inputs)
    dense = weight.integers * forward.scales.value().double()[:, weight.groups]
    expected = inputs @ dense.T + block["linear"].bias
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(gradients(found), gradients(expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    forward.undo(block["linear"])
    torch.testing.assert_close(block["linear"](inputs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "opt", "gemma3_text"])
def test_a_norm_with_trained_factors_is_one_with_other_tensors(architecture):
    norm = next(iter(norms_of(tiny_model(architecture)).values()))
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    inputs = torch.randn(3, norm.weight.shape[0]) + 1
    before = {name: p.detach().clone() for name, p in norm.named_parameters()}
    forward = NormForward(norm)
    assert all(torch.equal(before[name], p) for name, p in norm.named_parameters())
    torch.testing.assert_close(norm(inputs), type(norm).forward(norm, inputs))
    for factor in filter(None, (forward.weight, forward.bias)):
        nn.init.normal_(factor.step, std=0.5)
    expected = norm(inputs)
    forward.undo(norm)
    with torch.no_grad():
        norm.weight.copy_(forward.weight.value())
        if forward.bias is not None:
            norm.bias.copy_(forward.bias.value())
    torch.testing.assert_close(norm(inputs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("by", ["model", "block"])
@pytest.mark.parametrize(
    "train", [("scales",), ("norms",), ("vectors", "scales", "norms")], ids=" ".join
)
@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_what_is_trained_changes_and_nothing_else(architecture, train, by):
    model, quantized = _compensated(architecture)
    vectors, before = Compensation.attached_to(quantized), _tensors(quantized)
    rates = RATES if by == "model" else {name: rate / 5 for name, rate in RATES.items()}
    found = refine(quantized, model, by=by, train=train, **rates)
    after = _tensors(quantized)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    norms = {f"{path}.{leaf}" for path in norms_of(model) for leaf in ("weight", "bias")}
    allowed = {"vectors": "bias_compensation", "scales": "scales"}
    expected = {n for n in before for kind in train if n.endswith(f".{allowed.get(kind)}")}
    if "norms" in train:
        expected |= norms & set(before)
    if by == "block":  # what stands outside of the blocks is not trained
        inside = tuple(f"{path}." for path in found.blocks)
        expected = {name for name in expected if name.startswith(inside)}
    assert changed and changed <= expected
    assert len(changed) > 0.8 * len(expected)
    assert found.refined["after"] < found.refined["before"]
    assert found.refined["train"] == list(train)
    assert found.scales and found.joint
    assert set(found.vectors) == set(vectors.vectors)
    found.check(quantized)


def test_the_model_in_the_end_is_the_one_that_was_trained():
    """Its own kernels, with what was written, have the loss that training found."""
    model, quantized = _compensated()
    train = ("vectors", "scales", "norms")
    settings = {"train": train, "steps": 8, **RATES}
    found = refine(quantized, model, **settings)
    again = refine(quantized, model, **{**settings, "steps": 4, "learning_rate": 1e-12})
    assert again.refined["before"] == pytest.approx(found.refined["after"], rel=1e-3)


def test_a_run_that_stops_goes_on_from_where_it_was(tmp_path, monkeypatch):
    model, quantized = _compensated()
    other = copy.deepcopy(quantized)
    settings = {"train": ("vectors", "scales", "norms"), **RATES}
    refine(other, model, **settings)
    step, made = Training._step, []

    def stopped(self, number):
        if len(made) == 6:
            raise KeyboardInterrupt
        made.append(number)
        return step(self, number)

    before = _tensors(quantized)
    monkeypatch.setattr(Training, "_step", stopped)
    with pytest.raises(KeyboardInterrupt):
        refine(quantized, model, folder=tmp_path, **settings)
    assert all(torch.equal(before[name], t) for name, t in _tensors(quantized).items())
    monkeypatch.setattr(Training, "_step", step)
    refine(quantized, model, folder=tmp_path, **settings)
    assert torch.equal(_logits(quantized), _logits(other))


def test_all_do_better_than_vectors_alone():
    model, quantized = _compensated()
    other = copy.deepcopy(quantized)
    alone = refine(other, model)
    all_of_it = refine(quantized, model, train=("vectors", "scales", "norms"), **RATES)
    assert all_of_it.refined["before"] == pytest.approx(alone.refined["before"], rel=1e-4)
    assert all_of_it.refined["after"] < alone.refined["after"]


def test_less_memory_is_the_same_training():
    model, quantized = _compensated()
    other = copy.deepcopy(quantized)
    settings = {"train": ("vectors", "scales", "norms"), **RATES}
    expected = refine(other, model, **settings)
    found = refine(quantized, model, gradient_checkpointing=True, **settings)
    assert found.refined["after"] == pytest.approx(expected.refined["after"], rel=1e-3)
    torch.testing.assert_close(_logits(quantized), _logits(other), rtol=1e-2, atol=1e-2)


def test_mixed_precision_trains_them_as_well():
    model, quantized = _compensated()
    found = refine(quantized, model, train=("scales", "norms"), mixed_precision="bf16", **RATES)
    assert found.refined["after"] < 0.97 * found.refined["before"]


def test_where_training_gains_nothing_the_model_is_what_it_was():
    model, quantized = _compensated()
    before = _tensors(quantized)
    found = refine(quantized, model, train="scales", scales_learning_rate=0.5)
    assert found.refined["after"] == found.refined["before"]
    assert not found.scales and not found.joint
    assert all(torch.equal(before[name], t) for name, t in _tensors(quantized).items())


def test_what_has_no_scales_says_so():
    model = tiny_model()
    quantized = crudely_quantized(model)
    bc_plugin.compensate(quantized, model, CALIBRATION).attach(quantized)
    with pytest.raises(BiasCompensationError, match=r"no scales to train.*GPTQ, AWQ"):
        refine(quantized, model, train="scales")


@pytest.mark.parametrize("train", [(), ("vectors", "vectors"), ("weights",)])
def test_what_cannot_be_trained(train):
    with pytest.raises(BiasCompensationError, match=r"refinement: train=.*any of .*'scales'"):
        RefinementConfig(**{**SETTINGS, "train": train})


def test_unless_told_what_can_be_trained_is(capsys):
    model, quantized = _compensated()
    found = refine(quantized, model, steps=1)
    assert found.refined["train"] == ["vectors", "scales", "norms"]
    assert "stay as they are" not in capsys.readouterr().out
    model, quantized = compensated()
    assert refine(quantized, model, steps=1).refined["train"] == ["vectors", "norms"]
    assert "scales stay as they are: model.layers.0 has no linear" in capsys.readouterr().out
    with pytest.raises(BiasCompensationError, match="no linear with integers and scales"):
        refine(quantized, model, steps=1, train=("vectors", "scales", "norms"))


def test_by_block_vectors_alone_are():
    model, quantized = _compensated()
    assert refine(quantized, model, steps=1, by="block").refined["train"] == ["vectors"]


@pytest.mark.parametrize("kind", [RefinementConfig, BiasCompensationConfig])
def test_auto_is_a_setting_of_its_own(kind):
    name = "train" if kind is RefinementConfig else "refine_train"
    for given in ("auto", ["auto"]):
        assert getattr(kind(**{name: given}), name) == "auto"
    with pytest.raises(BiasCompensationError, match=f"{name}="):
        kind(**{name: ("auto", "norms")})
