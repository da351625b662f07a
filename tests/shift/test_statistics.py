import pytest
import torch

from bc_plugin.shift.statistics import ShiftStatistics


def _data(tokens=200, features=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randn(tokens, features, generator=generator, dtype=torch.float64)
    shift = torch.randn(tokens, features, generator=generator, dtype=torch.float64) + 0.7
    return reference, reference + shift, shift


def test_error_falls_by_exactly_the_squared_mean():
    reference, output, shift = _data()
    statistics = ShiftStatistics(0)
    statistics.update(reference, output.clone(), torch.zeros(200, dtype=torch.long), None)
    vectors = statistics.vectors()
    torch.testing.assert_close(vectors[0], -shift.mean(0), rtol=1e-12, atol=0)
    drop = statistics.error() - statistics.error(vectors)
    assert drop == pytest.approx(shift.mean(0).square().mean().item(), rel=1e-12)


def test_error_in_closed_form_is_the_measured_error():
    reference, output, _ = _data()
    rows = torch.arange(200).clamp(max=2)
    statistics = ShiftStatistics(2)
    statistics.update(reference, output.clone(), rows, None)
    vectors = torch.randn(3, 7, dtype=torch.float64)  # any vectors, not only the best ones
    measured = (output + vectors[rows] - reference).square().mean().item()
    assert statistics.error(vectors) == pytest.approx(measured, rel=1e-12)


def test_no_other_vector_does_better():
    reference, output, _ = _data()
    statistics = ShiftStatistics(0)
    statistics.update(reference, output.clone(), torch.zeros(200, dtype=torch.long), None)
    best = statistics.vectors()
    for _ in range(20):
        other = best + 0.1 * torch.randn_like(best)
        assert statistics.error(other) > statistics.error(best)


def test_each_leading_position_has_its_own_mean():
    reference, output, shift = _data()
    index = torch.arange(200) % 20
    statistics = ShiftStatistics(2)
    statistics.update(reference, output.clone(), index.clamp(max=2), None)
    expected = torch.stack(
        [shift[index == 0].mean(0), shift[index == 1].mean(0), shift[index >= 2].mean(0)]
    )
    torch.testing.assert_close(statistics.vectors(), -expected, rtol=1e-12, atol=1e-14)


def test_padding_is_left_out():
    reference, output, shift = _data()
    keep = torch.arange(200) % 3 != 0
    output[~keep] = float("inf")
    statistics = ShiftStatistics(0)
    statistics.update(reference, output, torch.zeros(200, dtype=torch.long), keep)
    torch.testing.assert_close(statistics.vectors()[0], -shift[keep].mean(0))
    assert statistics.tokens == keep.sum()


def test_batches_and_their_order_change_nothing_beyond_rounding():
    reference, output, _ = _data()
    rows = torch.arange(200).clamp(max=1)
    whole, parts = ShiftStatistics(1), ShiftStatistics(1)
    whole.update(reference, output.clone(), rows, None)
    for part in reversed(torch.arange(200).split(33)):
        parts.update(reference[part], output[part].clone(), rows[part], None)
    torch.testing.assert_close(whole.vectors(), parts.vectors(), rtol=1e-12, atol=1e-14)
    assert whole.error() == pytest.approx(parts.error(), rel=1e-12)


def test_float32_outputs_are_summed_in_float64():
    reference = torch.zeros(100_000, 1)
    output = torch.full((100_000, 1), 0.1)
    statistics = ShiftStatistics(0)
    statistics.update(reference, output, torch.zeros(100_000, dtype=torch.long), None)
    assert statistics.vectors().item() == pytest.approx(-torch.tensor(0.1).item(), rel=1e-13)


def test_a_row_no_token_reached_takes_the_mean_of_all_but_the_first_position():
    reference, output, shift = _data(tokens=40)
    index = torch.arange(40) % 4
    statistics = ShiftStatistics(4)
    statistics.update(reference, output.clone(), index, None)
    torch.testing.assert_close(statistics.vectors()[-1], -shift[index > 0].mean(0))
