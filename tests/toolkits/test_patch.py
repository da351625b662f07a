"""Patches: applied to whatever kind of function, undone without a trace, refused where unfit."""

import pytest
from helpers.toolkit import PATCHED, PLAIN, Class, results

from bc_plugin import BiasCompensationError, disable, enable, enabled


def test_enable_then_disable_leaves_no_trace(toolkits):
    toolkits("one")
    before = {name: id(value) for name, value in vars(Class).items()}
    assert enable() == enabled() == ("one",)
    assert results() == PATCHED
    disable()
    assert results() == PLAIN
    assert {name: id(value) for name, value in vars(Class).items()} == before
    assert enabled() == ()


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"versions": ("<0.1", "==0.2")}, r"is not supported; .*\"torch<0\.1\" or \"torch==0\.2\""),
        ({"targets": ("vanished",)}, r"has no made_for_tests:Class\.vanished"),
        ({"parameters": ("values",)}, r"has no parameter \['values'\]"),
    ],
    ids=["version", "function", "signature"],
)
def test_nothing_is_patched_when_something_does_not_fit(toolkits, second, message):
    toolkits("one")
    toolkits("two", **second)
    with pytest.raises(BiasCompensationError, match=message):
        enable()
    assert results() == PLAIN
    assert enabled() == ()
