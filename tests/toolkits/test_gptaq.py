"""The wrappers around a GPTAQ object, whichever way it counts samples."""

import pytest
import torch
from helpers.language import tiny_model
from torch import nn

from bc_plugin.models.blocks import find_blocks
from bc_plugin.toolkits.gptq import (
    batch_is_added_to_both,
    linear_is_quantized_for_float_outputs,
)
from bc_plugin.toolkits.joint import JointGPTQ, centred_inputs

SEQUENCES, LENGTH = 6, 16


class GPTAQ:
    """Accumulates as GPTQModel's does; its releases differ in what they call samples."""

    quantizer = nn.Identity()  # of a class whose integers are of another kind

    def __init__(self, module, batches, counted):
        self.module, self.native_inps, self.counted = module, batches, counted
        width = module.in_features
        self.nsamples, self.sequences = 0, 0
        self.H, self.dXXT = torch.zeros(width, width), torch.zeros(width, width)

    def add_batch(self, inp, out):
        floats, ours = self.native_inps.pop(0).flatten(0, -2), inp.flatten(0, -2)
        before, self.sequences = self.sequences, self.sequences + len(inp)
        self.nsamples += {"tokens": len(ours), "sequences": len(inp)}[self.counted]
        for sums, new in ((self.H, ours.T @ ours), (self.dXXT, (floats - ours).T @ ours)):
            sums.mul_(before / self.sequences).add_(new, alpha=2 / self.sequences)

    def quantize(self):
        self.used = self.H.clone(), self.dXXT.clone()
        return self.module.weight.detach(), None, None, None


@pytest.mark.parametrize("counted", ["tokens", "sequences"])
@pytest.mark.parametrize("batch", [1, 3])
def test_means_are_taken_out_of_both_sums(counted, batch):
    model = tiny_model()
    JointGPTQ(model, find_blocks(model), 0)
    linear = model.model.layers[1].mlp.up_proj
    ours = torch.randn(SEQUENCES, LENGTH, linear.in_features) + 2
    floats = ours + 0.1 * ours.roll(1, -1) + torch.rand(linear.in_features)
    gptaq = GPTAQ(linear, list(floats.split(batch)), counted)
    for inp in ours.split(batch):
        batch_is_added_to_both(gptaq.add_batch, gptaq, (inp,), {"out": None})
    linear_is_quantized_for_float_outputs(gptaq.quantize, gptaq, (), {})

    x, y = (each.double().flatten(0, 1) for each in (floats, ours))
    x, y = x - x.mean(0), y - y.mean(0)
    for found, expected in zip(gptaq.used, (y.T @ y, (x - y).T @ y), strict=True):
        expected = 2 / SEQUENCES * expected
        torch.testing.assert_close(
            found.double(), expected, rtol=1e-3, atol=1e-5 * expected.abs().max()
        )
    assert torch.equal(centred_inputs(linear).float_inputs.drift, gptaq.used[1])
