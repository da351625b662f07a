"""The covariance that joint quantization hands to GPTQ, and the bias that follows."""

import copy

import pytest
import torch
from helpers.language import tiny_model, token_batches
from torch import nn
from transformers.pytorch_utils import Conv1D

from bc_plugin import BiasCompensationError
from bc_plugin.models.blocks import find_blocks
from bc_plugin.toolkits.joint import JointGPTQ, centred_inputs, weight_of

SINK = 1000.0


class _GPTQ:
    """Accumulates as toolkits do, in float32: ``2 / samples * sum x x^T``."""

    def __init__(self, linear):
        self.linear, self.samples = linear, 0
        self.sum = torch.zeros(linear.in_features, linear.in_features)

    def add_batch(self, inputs):
        flat = inputs.reshape(-1, inputs.shape[-1]).float()
        self.samples += len(flat)
        self.sum += flat.T @ flat


def _run(model, batches, positions):
    """Accumulate one linear's inputs with and without the mean."""
    joint = JointGPTQ(model, find_blocks(model), positions)
    linear = model.model.layers[1].mlp.down_proj
    gptq, seen = _GPTQ(linear), []

    def hook(_, args, output):
        inputs = args[0].clone()
        inputs[:, 0] *= SINK
        seen.append(inputs.double())
        gptq.add_batch(centred_inputs(linear).centre(inputs))

    handle = linear.register_forward_hook(hook)
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    hessian = 2 / gptq.samples * gptq.sum
    centred_inputs(linear).finish(hessian, gptq.samples)
    return joint, linear, hessian, torch.cat(seen)


@pytest.mark.parametrize("positions", [0, 1, 4])
def test_the_hessian_is_the_covariance(positions):
    _, _, hessian, inputs = _run(tiny_model(), token_batches(3, batch=2), positions)
    later = inputs[:, 1:] if positions else inputs
    later = later.flatten(0, 1)
    mean = later.mean(0)
    expected = (later - mean).T @ (later - mean)
    if positions:
        expected += inputs[:, 0].T @ inputs[:, 0]
    expected *= 2 / inputs.shape[:-1].numel()
    torch.testing.assert_close(hessian.double(), expected, rtol=1e-4, atol=1e-4 * expected.max())
    assert torch.linalg.eigvalsh(hessian.double()).min() > -1e-6 * hessian.diagonal().mean()


@pytest.mark.parametrize("positions", [0, 1])
def test_layers_that_follow_see_the_best_bias(positions):
    model = tiny_model()
    joint, linear, _, inputs = _run(model, token_batches(3, batch=2), positions)
    before = weight_of(linear)
    with torch.no_grad():
        linear.weight.copy_((before / 0.1).floor() * 0.1)
    centred_inputs(linear).follow(linear, before, weight_of(linear))
    outputs = []
    linear.register_forward_hook(lambda m, args, output: outputs.append((args[0], output)))
    with torch.no_grad():
        model(**token_batches(1, batch=2)[0])
    given, output = outputs[0]
    mean = inputs[:, 1:].flatten(0, 1).mean(0) if positions else inputs.flatten(0, 1).mean(0)
    shift = (before - weight_of(linear)).double()
    added = output - nn.functional.linear(given, linear.weight)
    expected = (shift @ mean).float().expand(2, 15, -1)
    torch.testing.assert_close(added[:, 1:], expected, rtol=1e-3, atol=1e-3)
    first = inputs[:, 0].mean(0) if positions else mean
    expected = (shift @ first).float().expand(2, -1)
    torch.testing.assert_close(added[:, 0], expected, rtol=1e-3, atol=1e-2)
    joint.stop()
    with torch.no_grad():
        assert torch.equal(linear(given), nn.functional.linear(given, linear.weight))


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_what_the_toolkit_rounded_is_made_better(kind):
    """On the covariance that it was given, in scales that can be stored, for any orientation."""
    width, channels, size = 8, 4, 4
    linear = kind(width, channels) if kind is nn.Linear else kind(channels, width)
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Sequential(linear)])
    JointGPTQ(model, find_blocks(model), 0)
    gptq = _GPTQ(nn.Linear(width, channels))
    gptq.add_batch(centred_inputs(linear).centre(torch.randn(1, 90, width).cumsum(-1) + 2))
    hessian = 2 / gptq.samples * gptq.sum
    centred_inputs(linear).finish(hessian, gptq.samples)

    weight = weight_of(linear)
    turned = weight if kind is nn.Linear else weight.T
    groups = torch.arange(width) // size
    scales = turned.abs().view(channels, -1, size).amax(-1) / 2
    rounded = (turned / scales[:, groups]).round() * scales[:, groups]
    given = rounded if kind is nn.Linear else rounded.T
    limits = torch.full_like(scales, -2), torch.full_like(scales, 2)
    found, better = centred_inputs(linear).improve(linear, weight, given, scales, groups, *limits)

    assert found.shape == given.shape
    found = found if kind is nn.Linear else found.T
    integers = found / better[:, groups]
    torch.testing.assert_close(integers, integers.round().clamp(-2, 2))
    torch.testing.assert_close(better, better.half().float())

    def error(quantized):
        shift = (turned - quantized).detach()
        return ((shift @ hessian) * shift).sum()

    assert error(found) < 0.9 * error(rounded)


def test_padding_counts_as_the_toolkit_counts_it_and_leads_nothing():
    batch = token_batches(1, batch=2)[0]
    batch["attention_mask"][:, :3] = 0  # on the left
    model = tiny_model()
    joint = JointGPTQ(model, find_blocks(model), 1)
    with torch.no_grad():
        model(**batch)
    leading = (joint.tracker.rows == 0).nonzero().tolist()
    assert leading == [[0, 3], [1, 3]]
    joint.stop()


def test_a_constant_input_is_not_a_dead_one():
    linear = nn.Linear(3, 2)
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Sequential(linear)])
    JointGPTQ(model, find_blocks(model), 0)
    inputs = torch.randn(1, 50, 3)
    inputs[..., 1], inputs[..., 2] = 5.0, 0.0
    gptq = _GPTQ(linear)
    gptq.add_batch(centred_inputs(linear).centre(inputs))
    hessian = 2 / gptq.samples * gptq.sum
    centred_inputs(linear).finish(hessian, gptq.samples)
    assert hessian[1, 1] > 0
    assert hessian[2, 2] == 0


def test_tokens_that_cannot_be_placed_are_refused():
    model = tiny_model()
    joint = JointGPTQ(model, find_blocks(model), 1)
    with torch.no_grad():
        model(**token_batches(1)[0])
    linear = model.model.layers[0].mlp.up_proj
    with pytest.raises(BiasCompensationError, match=r"layers\.0\.mlp\.up_proj sees 5 of 16 tokens"):
        centred_inputs(linear).centre(torch.randn(5, linear.in_features))
    joint.stop()


def test_nothing_stays_behind():
    model = tiny_model()
    before = copy.deepcopy(model)
    JointGPTQ(model, find_blocks(model), 1).stop()
    assert centred_inputs(model.model.layers[0].mlp.up_proj) is None
    for ours, theirs in zip(model.modules(), before.modules(), strict=True):
        assert set(vars(ours)) == set(vars(theirs))
        assert not ours._forward_hooks and not ours._forward_pre_hooks
