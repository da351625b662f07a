"""Whether a kernel has repacked its weights is seen by what it gives."""

import pytest
import torch
from torch import nn

from bc_plugin import BiasCompensationError
from bc_plugin.models.repacked import require_as_stored

BITS, ROWS, COLUMNS = 4, 16, 8
SPELLINGS = [("in_features", "out_features"), ("infeatures", "outfeatures")]


class Packed(nn.Module):
    """4 bits, one group, as GPTQ stores them; AutoGPTQ spells its widths without underscores."""

    def __init__(self, spelling):
        super().__init__()
        self.bits = BITS
        for name, width in zip(spelling, (ROWS, COLUMNS), strict=True):
            setattr(self, name, width)
        generator = torch.Generator().manual_seed(0)
        values = torch.randint(0, 16, (ROWS, COLUMNS), generator=generator)
        self.register_buffer("qweight", _pack(values))
        self.register_buffer(
            "qzeros", _pack(torch.full((8, 1), 7)).view(1, 1)
        )  # 8, stored less one
        self.register_buffer("scales", torch.full((1, COLUMNS), 0.1))
        self.register_buffer("g_idx", torch.zeros(ROWS, dtype=torch.int32))
        self.weight = (values - 8) * 0.1

    def forward(self, inputs):
        return inputs @ self.weight


def _pack(values):
    """Columns of 4-bit numbers as int32 words, eight rows in each."""
    parts = values.view(-1, 8, values.shape[1]) << (BITS * torch.arange(8)).view(1, 8, 1)
    return parts.sum(1).to(torch.int32)


@pytest.mark.parametrize("spelling", SPELLINGS, ids=["in_features", "infeatures"])
def test_words_that_mean_what_the_linear_gives_are_as_stored(spelling):
    require_as_stored(nn.ModuleDict({"linear": Packed(spelling)}), "block")


@pytest.mark.parametrize("spelling", SPELLINGS, ids=["in_features", "infeatures"])
@pytest.mark.parametrize("repack", [lambda words: words.flip(0), lambda words: words.T])
def test_words_in_another_order_are_not(spelling, repack):
    linear = Packed(spelling)
    linear.qweight = repack(linear.qweight).contiguous()
    with pytest.raises(BiasCompensationError, match=r"block\.linear \(Packed\).*repacked"):
        require_as_stored(nn.ModuleDict({"linear": linear}), "block")
