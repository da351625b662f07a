"""Linears of compressed-tensors, as compressed-tensors itself packs and unpacks them."""

import pytest
import torch
from torch import nn

pytest.importorskip("compressed_tensors")
pytest.importorskip("accelerate")

from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

from bc_plugin.models.modules import set_tensor
from bc_plugin.streaming.compressed import FORMAT, CompressedLinear
from bc_plugin.vectors.lazy import LazyTensor

INPUTS, OUTPUTS, GROUP = 48, 330, 16  # channels are no multiple of what words hold


def packed(bits, symmetric):
    """A scheme, what is stored of a linear, and its weight."""
    weights = QuantizationArgs(
        num_bits=bits, strategy="group", group_size=GROUP, symmetric=symmetric
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    generator = torch.Generator().manual_seed(0)
    half, groups = 2 ** (bits - 1), (OUTPUTS, INPUTS // GROUP)
    state = {
        "weight": torch.randn(OUTPUTS, INPUTS, generator=generator),
        "weight_scale": (torch.rand(groups, generator=generator) + 1) / half,
    }
    if not symmetric:
        zeros = torch.randint(-half, half, groups, generator=generator)
        state["weight_zero_point"] = zeros.to(torch.int8)
    compressor = BaseCompressor.get_value_from_registry(FORMAT)
    stored = compressor.compress(state, scheme)
    return scheme, stored, compressor.decompress(dict(stored), scheme)["weight"]


def lazy(stored):
    return {name: LazyTensor.of(tensor) for name, tensor in stored.items()}


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("at_once", [1, 1 << 18])
def test_a_weight_is_compressed_tensors_own(monkeypatch, bits, symmetric, at_once):
    monkeypatch.setattr("bc_plugin.streaming.compressed.AT_ONCE", at_once)
    scheme, stored, weight = packed(bits, symmetric)
    linear = CompressedLinear(lazy(stored), scheme)
    assert (linear.step < OUTPUTS) == (at_once == 1)
    for name, tensor in stored.items():
        set_tensor(linear, name, tensor)
    # Unit vectors pick columns, and nothing else is added to them.
    assert torch.equal(linear(torch.eye(INPUTS)), weight.T)


def test_another_versions_packing_is_refused():
    scheme, stored, _ = packed(3, True)
    words = stored["weight_packed"]
    with pytest.raises(ValueError, match="packs them into"):
        CompressedLinear(lazy({**stored, "weight_packed": words[:, 1:]}), scheme)


@pytest.mark.parametrize(
    "changed",
    [
        {"format": "int-quantized"},
        {"kv_cache_scheme": {"num_bits": 8}},
        {"config_groups": {"a": {"num_bits": 4}, "b": {"num_bits": 8}}},
        {"config_groups": {"a": {"num_bits": 8, "activations": True}}},
    ],
)
def test_what_has_more_than_packed_integers_is_unknown(changed):
    settings = {"format": FORMAT, "config_groups": {"a": {"num_bits": 4}}}
    assert CompressedLinear.settings_of(_expanded(settings)).weights.num_bits == 4
    with pytest.raises(ValueError, match=r"known|several"):
        CompressedLinear.settings_of(_expanded(settings | changed))


def _expanded(settings):
    def group(num_bits, activations=False):
        weights = {"num_bits": num_bits, "strategy": "channel"}
        inputs = {"num_bits": 8, "strategy": "token", "dynamic": True} if activations else None
        return {"targets": ["Linear"], "weights": weights, "input_activations": inputs}

    groups = {name: group(**own) for name, own in settings["config_groups"].items()}
    return {**settings, "config_groups": groups}


def test_a_bias_is_added():
    scheme, stored, weight = packed(4, True)
    stored["bias"] = torch.randn(OUTPUTS)
    linear = CompressedLinear(lazy(stored), scheme)
    for name, tensor in stored.items():
        set_tensor(linear, name, tensor)
    inputs = torch.randn(2, 3, INPUTS)
    expected = nn.functional.linear(inputs, weight, stored["bias"])
    torch.testing.assert_close(linear(inputs), expected)
