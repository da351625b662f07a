"""The error with vectors in place, in closed form."""

import pytest
import torch

from bc_plugin.shift.statistics import ShiftStatistics


@pytest.mark.parametrize("positions", [0, 1])
def test_what_a_vector_takes_out_altogether_leaves_no_negative_error(positions):
    """Nothing is left of a shift that is the same everywhere, and rounding is all there is."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        shift = torch.randn(8, generator=generator).expand(50, 8)
        reference = torch.randn(50, 8, generator=generator)
        statistics = ShiftStatistics(positions)
        statistics.update(reference, reference + shift, torch.full((50,), positions), None)
        before, after = statistics.error(), statistics.error(statistics.vectors())
        assert 0 <= after < 1e-5 * before


def test_an_error_is_that_of_the_shifted_outputs():
    """With rows that no token has, and vectors that are not the means."""
    torch.manual_seed(0)
    reference, output = torch.randn(2, 30, 4, dtype=torch.float64)
    rows = torch.randint(0, 2, (30,)) * 2  # of three; nobody has the second
    statistics = ShiftStatistics(2)
    statistics.update(reference, output, rows, None)
    for vectors in (statistics.vectors(), torch.randn(3, 4, dtype=torch.float64)):
        expected = (output + vectors[rows] - reference).square().mean().item()
        assert statistics.error(vectors) == pytest.approx(expected, rel=1e-12)
