"""The pass on several ranks, each of which has its share of the sequences."""

import copy
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from helpers.grouped import grouped
from helpers.language import crudely_quantized, tiny_model, token_batches
from helpers.packed import packed_checkpoint
from helpers.ranks import on_ranks

import bc_plugin
from bc_plugin import BiasCompensationError, ranks
from bc_plugin.calibration.batches import split_held_out, spread
from bc_plugin.models.offloaded import stored_value

EXACT = {"dtype": "float64", "positions": 2}
SHARES = slice(0, 7), slice(7, 10)  # unequal ones
# One has nothing; in each case that holds some out, one has nothing but those.
OF_THREE = ((0, 0), (0, 7), (7, 10)), ((0, 1), (1, 2), (2, 10))
CASES = {
    "held out": {**EXACT, "held_out": 0.3},
    "dropped": {**EXACT, "held_out": 0.3, "keep_only_if_better": True},
    "fewer tokens": {**EXACT, "max_tokens": 70},
    "all positions": {**EXACT, "positions": "all", "held_out": 0.2},
    "scales": {**EXACT, "scales": True, "held_out": 0.3},
    "integers": {**EXACT, "integers": True, "positions": 1, "held_out": 0.3},
}


def _data():
    """Short sequences first: a rank by itself does not see how long the longest is."""
    return [token_batches(1, 8 + 2 * (n // 7), seed=n)[0] for n in range(10)]


def _compensated(case, data, seed=0):
    model = tiny_model(seed=0).double()
    if case == "integers":
        return _with_integers(model, data)
    # Few tokens and coarse steps, so that some sites are worse on what was held out.
    quantized = grouped(model) if case == "scales" else crudely_quantized(model, 0.4)
    if seed:
        with torch.no_grad():
            quantized.model.layers[2].mlp.down_proj.weight += 1
    found = bc_plugin.compensate(quantized, model, data, CASES[case])
    scales = {k: v for k, v in quantized.state_dict().items() if k.endswith(".scales")}
    return found.vectors, found.errors, scales


def _with_integers(model, data):
    from bc_plugin.streaming.load import open_streamed

    with TemporaryDirectory() as folder:
        packed_checkpoint(Path(folder), copy.deepcopy(model))
        quantized = open_streamed(folder)
        found = bc_plugin.compensate(quantized, model, data, CASES["integers"])
        names = [f"{n}.qweight" for n, kind in found.kinds.items() if kind == "linear"]
        return found.vectors, found.errors, {n: stored_value(quantized, n) for n in names}


def _on_a_rank(rank, shares):
    with ranks.together():
        data = _data()[slice(*shares[rank])]
        return {case: _compensated(case, data) for case in CASES}


@pytest.mark.parametrize("shares", [((0, 7), (7, 10)), *OF_THREE])
def test_the_vectors_of_several_ranks_are_those_of_one(tmp_path, shares):
    by_rank = on_ranks(len(shares), tmp_path, _on_a_rank, shares)
    for case in CASES:
        both = [found[case] for found in by_rank]
        vectors, errors, scales = _compensated(case, _data())
        assert (case in ("scales", "integers")) == bool(scales)
        for found, measured, fitted in both:
            assert found.keys() == vectors.keys(), case
            for name, expected in vectors.items():
                torch.testing.assert_close(found[name], expected)
                for field in ("before", "after", "held_out_before", "held_out_after"):
                    value = getattr(errors[name], field)
                    assert getattr(measured[name], field) == (value and pytest.approx(value))
            for name, expected in scales.items():
                torch.testing.assert_close(fitted[name], expected)
        (first, *_), *others = both
        for second, *_ in others:
            assert all(torch.equal(first[name], second[name]) for name in first), case
    dropped, kept = (_compensated(case, _data())[0] for case in ("dropped", "held out"))
    assert 0 < len(dropped) < len(kept)


def _alone(rank):
    return _compensated("held out", _data()[SHARES[rank]])[0]


def test_ranks_that_do_not_act_together_are_by_themselves(tmp_path):
    for share, found in zip(SHARES, on_ranks(2, tmp_path, _alone), strict=True):
        expected = _compensated("held out", _data()[share])[0]
        assert all(torch.equal(found[name], vectors) for name, vectors in expected.items())


def _refused(rank):
    with ranks.together(), pytest.raises(BiasCompensationError) as raised:
        _compensated("held out", _data()[SHARES[rank]], seed=rank)
    return str(raised.value)


def test_ranks_with_other_weights_are_refused(tmp_path):
    for message in on_ranks(2, tmp_path, _refused):
        assert "the quantized models of the ranks are not the same" in message


class Sums:
    SUMS = ("count", "total")

    def __init__(self, count, total):
        self.count, self.total = count, total


def _sums(rank):
    totals = (torch.ones(2, 3), None), (None, None), (torch.ones(2), torch.ones(3))
    holders = [Sums(rank + 1, total[rank]) for total in totals]
    with ranks.together():
        ranks.add_up(*holders[:2])
        with pytest.raises(BiasCompensationError, match="the same modules in the same shapes"):
            ranks.add_up(holders[2])
        with pytest.raises(BiasCompensationError, match="the same modules in the same shapes"):
            ranks.add_up(*holders[: rank + 1])
    return [(each.count, each.total) for each in holders]


def test_sums_where_some_ranks_have_none(tmp_path):
    for first, second, _ in on_ranks(2, tmp_path, _sums):
        assert first[0] == 3 and torch.equal(first[1].float(), torch.ones(2, 3))
        assert second == (3, None)


def _chosen(rank, share):
    items = list(range(4)) if rank == 0 else [4]
    sequences = [torch.full((1, 10), 7 + item) for item in items]
    with ranks.together():
        kept = [int(item[0, 0]) - 7 for item in spread(sequences, 20)]
        return kept, split_held_out(items, share)


def test_what_is_chosen_is_what_one_process_chooses(tmp_path):
    first, second = on_ranks(2, tmp_path, _chosen, 0.9)
    assert first == ([0, 2], ([2], [0, 1, 3]))
    assert second == ([], ([], [4]))
    assert split_held_out(range(5), 0.9) == ([2], [0, 1, 3, 4])
