"""Integers in 32-bit words, held against words put together by hand."""

import pytest
import torch

from bc_plugin.models.packed import integers_of, pack, packed_linears, unpack


def words(values, bits):
    """Integers one after the other, the first in the lowest bits, as signed 32-bit words."""
    whole = sum(value << bits * place for place, value in enumerate(values))
    parts = [(whole >> start) & 0xFFFFFFFF for start in range(0, bits * len(values), 32)]
    return torch.tensor([part - 2**32 if part >= 2**31 else part for part in parts]).int()


def integers(bits, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2**bits, (count,), generator=generator).tolist()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])  # of 3 bits some lie across two words
def test_integers_follow_each_other_from_the_lowest_bits_on(bits):
    rows = [integers(bits, 32, seed) for seed in range(2)]
    packed = torch.stack([words(row, bits) for row in rows])
    assert unpack(packed, bits, dim=1).tolist() == rows
    assert unpack(packed.T, bits, dim=0).T.tolist() == rows


def test_four_bits_are_packed_that_way():
    rows = [integers(4, 16, seed) for seed in range(2)]
    expected = torch.stack([words(row, 4) for row in rows])
    assert torch.equal(pack(torch.tensor(rows), 4, dim=1), expected)
    assert torch.equal(pack(torch.tensor(rows).T, 4, dim=0), expected.T)
    assert (expected < 0).any()  # one with its highest bit set


@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
def test_gptq_stores_zero_points_less_one_in_its_first_format(layout):
    bits, values, zeros = 4, integers(4, 8), [0, 3, 15, 1, 0, 7, 8, 2]
    stored = words(zeros, bits)
    if layout == "gptq":  # taken from whole words, so that a zero borrows from the next
        stored = stored - words([1] * 8, bits)
    tensors = {
        "linear.qweight": words(values, bits)[:, None].repeat(1, 8),
        "linear.qzeros": stored[None],
        "linear.g_idx": torch.zeros(8, dtype=torch.int32),
    }
    settings = {"quant_method": "gptq", "bits": bits, "format": layout}
    found = integers_of(tensors, *packed_linears(tensors), settings)
    assert found[0].T.tolist() == [values] * 8
    assert found[1].tolist() == [zeros]
    assert found[2].tolist() == [0] * 8


def test_awq_stores_columns_in_an_order_of_its_own():
    values, zeros = integers(4, 8), integers(4, 8, seed=1)
    packed = [
        words([row[column] for column in (0, 2, 4, 6, 1, 3, 5, 7)], 4) for row in (values, zeros)
    ]
    tensors = {"linear.qweight": packed[0].repeat(4, 1), "linear.qzeros": packed[1].repeat(2, 1)}
    found = integers_of(tensors, "linear", {"quant_method": "awq", "bits": 4})
    assert found[0].tolist() == [values] * 4
    assert found[1].tolist() == [zeros] * 2
    assert found[2].tolist() == [0, 0, 1, 1]
