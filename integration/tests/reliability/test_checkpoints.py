"""Checkpoints that are damaged, mismatched or stale are refused by name; harmless ones load."""

from dataclasses import replace

import pytest
from helpers.reliability import contents, entries, stale, vectors, weights
from helpers.reliability.cases import EITHER, chosen
from helpers.reliability.counts import hold

from bc_plugin.vectors.compensation import FILE

CASES = [
    *vectors.CASES,
    *vectors.IN_SHARDS,
    *entries.CASES,
    *weights.BY_PACKED,
    *weights.SHAPED,
    *weights.BESIDE,
    *weights.SETTINGS,
    *weights.GPTQ_SETTINGS,
    *contents.CASES,
    *stale.CASES,
]


@pytest.mark.parametrize("case", chosen(CASES), ids=str)
def test_transformers(case, checkpoint, enabled, tmp_path_factory):
    hold(case, tmp_path_factory.mktemp("case"), checkpoint)


def _by_hand(cases):
    """Where the vectors are read by themselves, a file of nothing else may be taken for them."""
    for case in cases:
        if case.expected == "plain":
            continue
        if any(part in case.name for part in stale.WITH_VECTORS):
            case = replace(case, right=EITHER, names=(FILE,))
        yield replace(case, family=f"{case.family}, by hand")


BY_HAND = [*_by_hand([*vectors.CASES[::6], *vectors.IN_SHARDS, *contents.CASES, *stale.CASES])]


@pytest.mark.parametrize("case", chosen(BY_HAND), ids=str)
def test_vectors_attached_by_hand(case, checkpoint_by_hand, tmp_path_factory):
    hold(case, tmp_path_factory.mktemp("case"), checkpoint_by_hand)


def _with_gptqmodel(cases):
    """It reads an index before a file beside it, quantize_config.json, and null as a config."""
    for case in cases:
        if "quantize_config.json" in case.name or case.name == "config.json: null":
            continue
        if case.family == "stale files" and "shards" in case.name:
            case = replace(case, right=EITHER, names=("/checkpoint",))
        yield replace(case, family=f"{case.family}, GPTQModel")


WITH_GPTQMODEL = [
    *_with_gptqmodel(
        [
            *vectors.CASES[::6],
            *vectors.IN_SHARDS,
            *entries.CASES[::6],
            *weights.BY_PACKED[::2],
            *weights.SHAPED,
            *weights.BESIDE[::2],
            *contents.CASES[::4],
            *stale.CASES,
        ]
    )
]


@pytest.mark.parametrize("case", chosen(WITH_GPTQMODEL), ids=str)
def test_gptqmodel(case, checkpoint_of_gptqmodel, enabled, tmp_path_factory):
    hold(case, tmp_path_factory.mktemp("case"), checkpoint_of_gptqmodel)
