"""Vectors in a file of their own that are damaged, or beside other weights, are refused by name."""

import pytest
from helpers.reliability import contents, entries, vectors, weights
from helpers.reliability.cases import chosen
from helpers.reliability.counts import hold

CASES = [
    *vectors.CASES,
    *entries.CASES,
    *weights.BY_FLOAT,
    *weights.BESIDE,
    *contents.APART,
]


@pytest.mark.parametrize("case", chosen(CASES), ids=str)
def test_vectors_apart(case, apart, tmp_path_factory):
    hold(case, tmp_path_factory.mktemp("case"), apart)
