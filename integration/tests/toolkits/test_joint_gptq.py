"""The toolkits' own GPTQ objects, told that a bias will follow."""

import importlib.util

import pytest
import torch
from rig.cpu_shims import auto_gptq_on_cpu
from torch import nn

import bc_plugin
from bc_plugin.models.blocks import find_blocks
from bc_plugin.toolkits.joint import JointGPTQ

BITS, GROUP_SIZE, FEATURES = 3, 32, 64
KNOWN = [name for name in ("auto_gptq", "gptqmodel") if importlib.util.find_spec(name)]


@pytest.fixture(scope="module", autouse=True)
def _on_cpu():
    if "auto_gptq" in KNOWN:
        with auto_gptq_on_cpu():
            yield
    else:
        yield


def _gptq(toolkit, linear, sym):
    if toolkit == "auto_gptq":
        from auto_gptq.quantization import GPTQ

        gptq = GPTQ(linear)
        gptq.quantizer.configure(BITS, perchannel=True, sym=sym, mse=False)
    else:
        from gptqmodel import QuantizeConfig
        from gptqmodel.quantization import GPTQ

        config = QuantizeConfig(
            bits=BITS, group_size=GROUP_SIZE, sym=sym, act_group_aware=False, device="cpu"
        )
        gptq = GPTQ(linear, config)
        gptq.quantizer.configure(perchannel=True, bits=BITS, sym=sym)
    return gptq


def _quantized(toolkit, weight, batches, joint, act_order, sym):
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Sequential(nn.Linear(FEATURES, FEATURES, bias=False))])
    linear = model.layers[0][0]
    linear.weight.data = weight.clone()
    run = JointGPTQ(model, find_blocks(model), 0) if joint else None
    gptq = _gptq(toolkit, linear, sym)
    for batch in batches:
        gptq.add_batch(batch, None)
    gptq.fasterquant(percdamp=0.01, group_size=GROUP_SIZE, actorder=act_order)
    if run is not None:
        assert len(run.quantized) == 1
        run.stop()
    return linear.weight.detach().double()


@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("act_order", [False, True], ids=["plain", "act-order"])
@pytest.mark.parametrize("toolkit", KNOWN)
def test_what_is_left_is_never_more_than_after_gptq_and_compensation(
    enabled, toolkit, act_order, sym
):
    """Of a linear whose mean shift is taken out, ``tr (W - Q) C (W - Q)^T`` is left."""
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(FEATURES, FEATURES, generator=generator)
        mixing = torch.randn(FEATURES, FEATURES, generator=generator)
        mean = 10 * torch.randn(FEATURES, generator=generator)
        inputs = torch.randn(8, 64, FEATURES, generator=generator) @ mixing + mean
        covariance = torch.cov(inputs.flatten(0, 1).T.double(), correction=0)
        left = {}
        for joint in (False, True):
            quantized = _quantized(toolkit, weight, inputs.split(1), joint, act_order, sym)
            shift = weight.double() - quantized
            left[joint] = ((shift @ covariance) * shift).sum().item()
        assert left[True] < left[False]


def test_without_a_run_the_objects_are_untouched():
    (toolkit,) = KNOWN[:1]
    weight = torch.randn(FEATURES, FEATURES)
    inputs = torch.randn(4, 64, FEATURES).split(1)
    plain = _quantized(toolkit, weight, inputs, False, False, False)
    bc_plugin.enable()
    patched = _quantized(toolkit, weight, inputs, False, False, False)
    bc_plugin.disable()
    assert torch.equal(patched, plain)
