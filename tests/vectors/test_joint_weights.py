"""Weights that were quantized jointly with their linears' vectors keep one for each of those."""

import pytest
import torch
from helpers.language import crudely_quantized, tiny_model, token_batches

import bc_plugin
from bc_plugin import BiasCompensationConfig, BiasCompensationError
from bc_plugin.toolkits.joint import centred_inputs
from bc_plugin.toolkits.run import CompensatedQuantization
from bc_plugin.vectors.joint import joint_linears, mark_joint


@pytest.fixture
def detached():
    """A float model, and one that was quantized jointly and lost its vectors."""
    model = tiny_model()
    quantized = crudely_quantized(model)
    compensation = bc_plugin.compensate(quantized, model, token_batches()).replaced(joint=True)
    compensation.attach(quantized)
    compensation.detach(quantized)
    return model, quantized, compensation


def _linears(compensation):
    return {name for name, kind in compensation.kinds.items() if kind == "linear"}


def test_they_are_joint_again(detached):
    model, quantized, before = detached
    found = bc_plugin.compensate(quantized, model, token_batches(), {"positions": 0})
    assert found.joint
    assert _linears(found) == _linears(before)


def test_they_stay_joint_after_other_vectors_were_attached(detached):
    model, quantized, before = detached
    alone = before.replaced(joint=False)
    alone.attach(quantized)
    alone.detach(quantized)
    assert bc_plugin.compensate(quantized, model, token_batches()).joint


def test_weights_that_were_quantized_alone_stay_so(detached):
    model, _, _ = detached
    other = crudely_quantized(model)
    found = bc_plugin.compensate(other, model, token_batches())
    found.attach(other)
    found.detach(other)
    assert not joint_linears(other)
    assert not bc_plugin.compensate(other, model, token_batches(), {"sites": "block"}).joint


def test_blocks_alone_are_refused(detached):
    model, quantized, _ = detached
    with pytest.raises(BiasCompensationError, match=r"jointly.*keep linear among the sites"):
        bc_plugin.compensate(quantized, model, token_batches(), {"sites": "block"})


def test_linears_that_would_be_left_without_are_refused(detached):
    model, quantized, _ = detached
    name = "model.layers.1.mlp.up_proj"
    with torch.no_grad():
        quantized.get_submodule(name).weight.copy_(model.get_submodule(name).weight)
    with pytest.raises(BiasCompensationError, match=f"1 of 21.*{name}"):
        bc_plugin.compensate(quantized, model, token_batches())


def test_keep_only_if_better_drops_none_of_them():
    model = tiny_model()
    quantized = crudely_quantized(model, step=1e-3)  # shifts too small to estimate from few tokens
    config = {"held_out": 0.5, "keep_only_if_better": True}
    batches = token_batches(2, length=3)
    alone = bc_plugin.compensate(quantized, model, batches, config)
    names = {name for name in _all_linears(model) if name not in alone.vectors}
    assert names
    mark_joint(quantized, names)
    found = bc_plugin.compensate(quantized, model, batches, config)
    assert found.joint
    assert _linears(found) == _linears(alone) | names


def _all_linears(model):
    return [
        name
        for name, module in model.model.named_modules(prefix="model")
        if type(module) is torch.nn.Linear
    ]


@torch.no_grad()
def _quantize(model, batches):
    """As a toolkit does that knows of the vectors to come, but crudely."""
    linears = [model.get_submodule(name) for name in _all_linears(model)]
    handles = [linear.register_forward_pre_hook(_centre) for linear in linears]
    for batch in batches:
        model(**batch)
    for linear, handle in zip(linears, handles, strict=True):
        handle.remove()
        before = linear.weight.clone()
        linear.weight.copy_((before / 1e-3).floor() * 1e-3)
        centred_inputs(linear).follow(linear, before, linear.weight)


def _centre(linear, args):
    centred_inputs(linear).centre(args[0])


@pytest.mark.parametrize("joint", [True, False])
def test_a_run_of_a_toolkit_ends_with_all_of_them_or_is_not_joint(joint):
    model = tiny_model()
    config = BiasCompensationConfig(held_out=0.5, keep_only_if_better=True, joint=joint)
    batches = token_batches(2, length=3)
    with CompensatedQuantization(model, config, lambda name, block: block) as run:
        run.start(batches)
        if joint:
            _quantize(model, batches)
        else:
            model.model.load_state_dict(crudely_quantized(model, step=1e-3).model.state_dict())
        found = run.finish(model)
    assert found.joint == joint
    assert (_linears(found) == set(_all_linears(model))) == joint
