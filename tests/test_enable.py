"""Enabling and disabling, on a toolkit made for the purpose."""

import sys
from types import ModuleType

import pytest

from bc_plugin import BiasCompensationError, disable, enable, enabled
from bc_plugin.toolkits.patch import Patch, Toolkit


class _Parent:
    def inherited(self, value):
        return value


class _Class(_Parent):
    def method(self, value):
        return value

    @classmethod
    def build(cls, value):
        return cls, value

    @staticmethod
    def double(value):
        return 2 * value


def _negated(wrapped, instance, args, kwargs):
    result = wrapped(*args, **kwargs)
    return (result[0], -result[1]) if isinstance(result, tuple) else -result


NAMES = ("method", "inherited", "build", "double")


@pytest.fixture
def toolkits(monkeypatch):
    module = ModuleType("made_for_tests")
    module.Class = _Class
    monkeypatch.setitem(sys.modules, "made_for_tests", module)
    known = {}

    def add(name, distribution="torch", versions=(">=1",), targets=NAMES, parameters=(), needs=()):
        patches = tuple(Patch(f"made_for_tests:Class.{t}", _negated, parameters) for t in targets)
        known[name] = Toolkit(name, distribution, versions, patches, needs)

    monkeypatch.setattr(sys.modules["bc_plugin.enable"], "_toolkits", lambda: known)
    yield add
    disable()


def _results():
    instance = _Class()
    return instance.method(1), instance.inherited(1), _Class.build(1), _Class.double(1)


PLAIN, PATCHED = (1, 1, (_Class, 1), 2), (-1, -1, (_Class, -1), -2)


def test_enable_then_disable_leaves_no_trace(toolkits):
    toolkits("one")
    before = {name: id(value) for name, value in vars(_Class).items()}
    assert enable() == enabled() == ("one",)
    assert _results() == PATCHED
    disable()
    assert _results() == PLAIN
    assert {name: id(value) for name, value in vars(_Class).items()} == before
    assert enabled() == ()


def test_enabling_twice_wraps_once(toolkits):
    toolkits("one")
    enable()
    enable("one")
    assert _results() == PATCHED
    disable()
    assert _results() == PLAIN
    disable()


def test_a_toolkit_brings_along_what_it_needs(toolkits):
    toolkits("one", targets=("method",), needs=("two", "absent"))
    toolkits("absent", distribution="no-such-distribution")
    toolkits("two", targets=("double",), needs=("one", "four"))
    toolkits("three", targets=("build",))
    toolkits("four", targets=())
    assert set(enable("one")) == {"one", "two", "four"}
    assert _results() == (-1, 1, (_Class, 1), -2)


def test_toolkits_that_are_not_installed_are_passed_over(toolkits):
    toolkits("one")
    toolkits("absent", distribution="no-such-distribution")
    assert enable() == ("one",)
    with pytest.raises(BiasCompensationError, match=r"not installed.*no-such-distribution>=1"):
        enable("absent")


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
    assert _results() == PLAIN
    assert enabled() == ()


def test_unknown_names_and_empty_environments_are_refused(toolkits):
    with pytest.raises(BiasCompensationError, match="no toolkit is installed"):
        enable()
    toolkits("one")
    with pytest.raises(BiasCompensationError, match=r"unknown toolkits \['two'\].*\['one'\]"):
        enable("two")


def test_importing_patches_nothing():
    import subprocess

    program = (
        "import bc_plugin, bc_plugin.patches, sys; assert bc_plugin.enabled() == (); "
        "assert not {'transformers', 'optimum', 'gptqmodel', 'auto_gptq'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
