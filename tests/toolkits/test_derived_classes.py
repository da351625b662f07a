"""One patch for all classes that are derived from one."""

import sys
from types import ModuleType

import pytest

from bc_plugin import BiasCompensationError, disable, enable
from bc_plugin.supported import Supported
from bc_plugin.toolkits.patch import Patch, Toolkit


class Base:
    def f(self):
        return 1


class One(Base):
    def f(self):
        return 2


class Two(One):
    def f(self):
        return 10 * super().f()


class Inheriting(Base):
    pass


class Stranger:
    def f(self):
        return 3


def _negated(wrapped, instance, args, kwargs):
    return -wrapped(*args, **kwargs)


@pytest.fixture
def toolkit(monkeypatch):
    """Known to ``enable`` with one patch, whose target it is given."""
    module = ModuleType("made_of_classes")
    for found in (Base, One, Two, Inheriting, Stranger):
        setattr(module, found.__name__, found)
    monkeypatch.setitem(sys.modules, "made_of_classes", module)

    def make(target):
        patches = (Patch(f"made_of_classes:{target}", _negated),)
        made = {"made": Toolkit("made", Supported("torch", (">=1",)), config=patches)}
        monkeypatch.setattr(sys.modules["bc_plugin.enable"], "_toolkits", lambda: made)

    yield make
    disable()


def _results():
    return [found().f() for found in (Base, One, Two, Inheriting, Stranger)]


def test_those_that_have_their_own_are_patched(toolkit):
    toolkit("Base+.f")
    traces = [dict(vars(found)) for found in (Base, One, Two, Inheriting)]
    enable()
    assert _results() == [1, -2, 20, 1, 3]  # Two's calls One's
    disable()
    assert _results() == [1, 2, 20, 1, 3]
    assert [dict(vars(found)) for found in (Base, One, Two, Inheriting)] == traces


@pytest.mark.parametrize("target", ["Base+.vanished", "Vanished+.f"])
def test_a_release_without_them_is_refused(toolkit, target):
    toolkit(target)
    with pytest.raises(BiasCompensationError, match="has no made_of_classes:"):
        enable()
    assert _results() == [1, 2, 20, 1, 3]
