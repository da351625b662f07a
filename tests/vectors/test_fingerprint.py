"""Every bit of a tensor counts, wherever it is."""

import pytest
import torch
from helpers.language import tiny_model

from bc_plugin.vectors.fingerprint import ROW, ROWS, WORD, fingerprint
from bc_plugin.vectors.weights import weights_of


def words(count=4 * ROW + 5, dtype=torch.int32):
    return torch.arange(count, dtype=torch.int64).mul(2654435761).to(dtype)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 7, ROW, 3 * ROW + 1])
def test_a_bit_anywhere_is_seen(dtype, count):
    tensor = torch.ones(count, dtype=dtype)
    before = fingerprint(tensor)
    for place in {0, count // 2, count - 1}:
        other = tensor.clone()
        other.view(torch.uint8)[place * tensor.itemsize] ^= 1
        assert fingerprint(other) != before
    assert fingerprint(tensor.clone()) == before


def test_the_order_counts():
    tensor = words().view(-1, 1)[: 4 * ROW].view(128, -1)
    swapped = {
        "rows": tensor[[1, 0, *range(2, 128)]],
        "columns": tensor[:, [1, 0, *range(2, tensor.shape[1])]],
        "transposed": tensor.T,
    }
    found = {name: fingerprint(other) for name, other in swapped.items()}
    assert len({fingerprint(tensor), *found.values()}) == 4


def test_parts_count():
    """More than is read at once, and what swaps two parts of it."""
    size = ROWS * ROW * WORD
    tensor = torch.zeros(2 * size + 3, dtype=torch.uint8)
    tensor[5] = 1
    other = tensor.clone()
    other[5], other[size + 5] = 0, 1
    assert fingerprint(tensor) != fingerprint(other)


def test_a_strided_tensor_is_read_in_its_order():
    tensor = words(24).view(4, 6)
    assert fingerprint(tensor.T.contiguous().T) == fingerprint(tensor)


def test_one_replaced_weight_is_another_digest():
    model = tiny_model(hidden_size=64)
    before = weights_of(model, ["model.layers"])
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[3, 5] += 0.01
    assert weights_of(model, ["model.layers"]) != before
