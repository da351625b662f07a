"""Integers in the words that toolkits pack them into, read and put there again."""

import copy
from contextlib import contextmanager

import pytest
import torch
from helpers.grouped import GroupedLinear
from helpers.language import tiny_model
from helpers.packed import packed_checkpoint
from torch import nn

from bc_plugin import BiasCompensationError
from bc_plugin.models.integers import integer_weights
from bc_plugin.models.modules import copy_of, set_tensor
from bc_plugin.models.offloaded import lent
from bc_plugin.models.packed import pack, unpack
from bc_plugin.models.words import packed_integers

pytest.importorskip("accelerate")

from bc_plugin.streaming.load import open_streamed

WIDE = {"intermediate_size": 64, "num_hidden_layers": 1, "num_key_value_heads": 4}
FORMATS = {
    **{f"gptq-{bits}": {"bits": bits} for bits in (2, 3, 4, 8)},
    "gptq_v2": {"bits": 4, "checkpoint_format": "gptq_v2"},
    "awq": {"method": "awq"},
    **{
        f"compressed-{bits}{'' if symmetric else '-zeros'}": {"compressed": (bits, symmetric)}
        for bits in (2, 3, 4, 8)
        for symmetric in (True, False)
    },
}


@contextmanager
def _linear(folder, compressed=None, **settings):
    """A module that holds a quantized linear, and that linear's path."""
    if compressed is not None:
        yield _compressed(*compressed), "linear"
        return
    packed_checkpoint(folder, tiny_model(**WIDE), **settings)
    model = open_streamed(folder)
    with lent(model, "model.layers.0"):
        yield model.model.layers[0], "mlp.up_proj"


def _compressed(bits, symmetric):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    from bc_plugin.streaming.compressed import CompressedLinear
    from bc_plugin.vectors.lazy import LazyTensor

    arguments = {"strategy": "group", "group_size": 16, "symmetric": symmetric}
    weights = QuantizationArgs(num_bits=bits, **arguments)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    half, groups = 2 ** (bits - 1), (70, 3)
    state = {"weight": torch.randn(70, 48), "weight_scale": (torch.rand(groups) + 1) / half}
    if not symmetric:
        state["weight_zero_point"] = torch.randint(-half, half, groups).to(torch.int8)
    stored = BaseCompressor.get_value_from_registry("pack-quantized").compress(state, scheme)
    linear = CompressedLinear({n: LazyTensor.of(t) for n, t in stored.items()}, scheme)
    for name, tensor in stored.items():
        set_tensor(linear, name, tensor)
    return nn.ModuleDict({"linear": linear})


def _read(block, path):
    weight = integer_weights(block, [path], copy_of, torch.float32)[path]
    return weight, packed_integers(path, block.get_submodule(path), weight)


@pytest.mark.parametrize("settings", FORMATS.values(), ids=FORMATS)
def test_what_is_put_there_is_what_the_linear_multiplies_with(tmp_path, settings):
    torch.manual_seed(0)
    with _linear(tmp_path, **settings) as (block, path):
        weight, packed = _read(block, path)
        words = packed.words.clone()
        packed.write(weight.integers)
        assert torch.equal(packed.words, words)
        low, high = (limit[:, weight.groups] for limit in (packed.low, packed.high))
        assert bool((weight.integers >= low).all() and (weight.integers <= high).all())
        share = torch.rand(weight.integers.shape)
        share[:, ::5], share[:, 1::5] = 0, 1  # what is at its limit as well
        others = (low + share * (high - low)).round()
        packed.write(others)
        again, _ = _read(block, path)
        assert torch.equal(again.integers.float(), others)
        assert torch.equal(again.stored, weight.stored)
        packed.write(weight.integers)
        assert torch.equal(packed.words, words)


def test_words_of_some_other_kind_are_refused():
    block = nn.ModuleDict({"linear": GroupedLinear(nn.Linear(32, 32))})
    with pytest.raises(BiasCompensationError, match=r"GroupedLinear, which keeps.*GPTQ, AWQ"):
        _read(block, "linear")
    linear = block.linear
    linear.qweight = torch.randint(2**31, (4, 32), dtype=torch.int32)  # of 4 bits, by its shape
    weight = copy.deepcopy(GroupedLinear(nn.Linear(32, 32)))
    read = integer_weights(
        nn.ModuleDict({"linear": weight}), ["linear"], copy.deepcopy, torch.float32
    )
    with pytest.raises(
        BiasCompensationError, match="keeps its integers in a way that is not known"
    ):
        packed_integers("linear", linear, read["linear"])


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("dim", [0, 1])
def test_packing_is_the_reverse_of_unpacking(bits, dim):
    values = torch.randint(2**bits, (64, 96), dtype=torch.int32)
    values[:3], values[3:5] = 2**bits - 1, 0
    words = pack(values, bits, dim)
    assert words.dtype == torch.int32 and words.numel() * 32 == values.numel() * bits
    assert torch.equal(unpack(words, bits, dim), values)
