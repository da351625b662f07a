"""Toolkits are patched when they are imported, before ``enable`` or after it."""

import importlib
import subprocess
import sys

import pytest

from bc_plugin import BiasCompensationError, disable, enable, enabled
from bc_plugin.supported import Supported
from bc_plugin.toolkits.patch import Patch, Toolkit


def _negated(wrapped, instance, args, kwargs):
    return -wrapped(*args, **kwargs)


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A toolkit of two modules that nobody has imported; each has a function ``f``."""
    names = [f"{tmp_path.name}_{part}".replace("-", "_") for part in ("one", "two")]
    for name in names:
        (tmp_path / f"{name}.py").write_text("def f(value):\n    return value\n")
    monkeypatch.syspath_prepend(tmp_path)
    patches = [Patch(f"{name}:f", _negated, ("value",)) for name in names]
    known = {"made": Toolkit("made", Supported("torch", (">=1",)), quantizing=tuple(patches))}
    monkeypatch.setattr(sys.modules["bc_plugin.enable"], "_toolkits", lambda: known)
    yield names
    disable()
    for name in names:
        sys.modules.pop(name, None)


def test_what_is_imported_later_is_patched_then(made):
    first = importlib.import_module(made[0])
    enable()
    assert made[1] not in sys.modules
    assert first.f(1) == importlib.import_module(made[1]).f(1) == -1


def test_disable_takes_out_both_and_what_comes_afterwards(made):
    first = importlib.import_module(made[0])
    enable()
    disable()
    second = importlib.import_module(made[1])
    assert first.f(1) == second.f(1) == 1
    enable()
    enable()
    assert first.f(1) == second.f(1) == -1


def test_a_difference_from_the_release_is_raised_by_the_import(made, tmp_path):
    (tmp_path / f"{made[1]}.py").write_text("def f(other):\n    return other\n")
    first = importlib.import_module(made[0])
    enable()
    with pytest.raises(BiasCompensationError, match=r"has no parameter \['value'\]"):
        importlib.import_module(made[1])
    assert enabled() == ()
    assert first.f(1) == 1


def test_enable_imports_nothing_that_the_user_has_not():
    program = (
        "import sys, bc_plugin; before = set(sys.modules); bc_plugin.enable(); "
        "new = {name.split('.')[0] for name in set(sys.modules) - before}; "
        "assert not new & {'transformers', 'optimum', 'gptqmodel', 'auto_gptq', 'awq'}, new"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
