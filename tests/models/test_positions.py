import pytest
import torch

from bc_plugin import BiasCompensationError
from bc_plugin.models.call_tokens import rows_of
from bc_plugin.models.positions import token_index, vector_rows


class _Cache:
    def __init__(self, length):
        self.length = length

    def get_seq_length(self):
        return self.length


IDS = torch.zeros(2, 4, dtype=torch.long)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, [[0, 1, 2, 3]] * 2),
        ({"past_key_values": _Cache(5)}, [[5, 6, 7, 8]] * 2),
        (
            {"attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])},
            [[-1, -1, 0, 1], [0, 1, 2, -1]],
        ),
        (
            {
                "attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]),
                "past_key_values": _Cache(2),
            },
            [[1, 2, 3, 4], [2, 3, 4, 5]],
        ),
        ({"position_ids": torch.tensor([[0, 1, 0, 1]])}, [[0, 1, 0, 1]] * 2),
        (
            # Left padding, with positions counted from the row's start: the mask knows better.
            {
                "position_ids": torch.tensor([[0, 1, 2, 3]]),
                "attention_mask": torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]]),
            },
            [[-1, -1, 0, 1], [-1, 0, 1, 2]],
        ),
        (
            # Packed sequences under a mask of ones: the positions know better.
            {
                "position_ids": torch.tensor([[0, 1, 2, 0]]),
                "attention_mask": torch.ones(2, 4, dtype=torch.long),
            },
            [[0, 1, 2, 0]] * 2,
        ),
        (
            {"attention_mask": torch.tril(torch.ones(4, 4)).bool().expand(2, 1, 4, 4)},
            [[0, 1, 2, 3]] * 2,
        ),
    ],
    ids=[
        "plain",
        "cache",
        "padding",
        "padding-cache",
        "packed",
        "left-offset",
        "packed-mask",
        "4d",
    ],
)
def test_token_index(arguments, expected):
    index = token_index({"input_ids": IDS, **arguments})
    assert index.tolist() == expected


def test_a_4d_mask_of_large_negative_numbers_means_the_same():
    allowed = torch.tril(torch.ones(4, 4)).bool()
    additive = torch.zeros(4, 4).masked_fill(~allowed, torch.finfo(torch.float32).min)
    index = token_index({"input_ids": IDS, "attention_mask": additive.expand(2, 1, 4, 4)})
    assert index.tolist() == [[0, 1, 2, 3]] * 2


def test_embeddings_instead_of_ids():
    assert token_index({"inputs_embeds": torch.zeros(1, 3, 8)}).tolist() == [[0, 1, 2]]


def test_a_mask_too_short_is_an_error():
    with pytest.raises(BiasCompensationError, match="3 columns for 4 tokens"):
        token_index({"input_ids": IDS, "attention_mask": torch.ones(2, 3)})


def test_images_have_no_tokens_yet():
    assert token_index({"pixel_values": torch.zeros(1, 3, 8, 8)}) is None


def test_vector_rows_padding_uses_the_shared_row():
    index = torch.tensor([[-1, 0, 1, 2, 3]])
    assert vector_rows(index, 2).tolist() == [[2, 0, 1, 2, 2]]
    assert vector_rows(index, 0).tolist() == [[0] * 5]


def test_rows_fit_tokens_in_order_only():
    rows = torch.tensor([[0, 1, 1, 1], [0, 1, 1, 1]])
    assert torch.equal(rows_of(rows, torch.zeros(2, 4, 3)), rows)
    assert torch.equal(rows_of(rows, torch.zeros(8, 3)), rows.flatten())
    for tokens in [(4, 2), (2, 2, 2), (2, 5)]:  # windows, and other tokens
        with pytest.raises(BiasCompensationError, match="positions=0"):
            rows_of(rows, torch.zeros(*tokens, 3))
