"""Names of sites, many in one."""

import itertools

import pytest

from bc_plugin.vectors.short_names import collapse, expand


@pytest.mark.parametrize(
    "names",
    [
        ["model.layers.0", "model.layers.1", "model.layers.2"],
        ["h.0.mlp", "h.2.mlp", "h.3.mlp", "h.10.mlp", "h.0", "h.10"],
        ["encoder", "decoder.block"],
        ["a.0.experts.1.up", "a.0.experts.2.up", "a.1.experts.1.up"],
        [],
    ],
)
def test_short_names_stand_for_all_names(names):
    groups = collapse(names)
    assert sorted(itertools.chain(*groups.values())) == sorted(names)
    for short, members in groups.items():
        assert expand(short) == members


def test_short_names_are_short():
    names = [f"model.layers.{i}.mlp.down_proj" for i in range(30) if i != 7]
    assert list(collapse(names)) == ["model.layers.[0-6,8-29].mlp.down_proj"]
