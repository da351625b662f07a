import os
import sys
from types import ModuleType

import pytest
import torch
from helpers.toolkit import NAMES, Class, negated

from bc_plugin import disable
from bc_plugin.supported import Supported
from bc_plugin.toolkits.patch import Patch, Toolkit

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def _repeatable():
    torch.manual_seed(0)


@pytest.fixture
def toolkits(monkeypatch):
    """Adds a toolkit made for tests; there are no others."""
    module = ModuleType("made_for_tests")
    module.Class = Class
    monkeypatch.setitem(sys.modules, "made_for_tests", module)
    known = {}

    def add(name, distribution="torch", versions=(">=1",), targets=NAMES, parameters=(), needs=()):
        patches = tuple(Patch(f"made_for_tests:Class.{t}", negated, parameters) for t in targets)
        supported = Supported(distribution, versions)
        known[name] = Toolkit(name, supported, quantizing=patches, needs=needs)

    monkeypatch.setattr(sys.modules["bc_plugin.enable"], "_toolkits", lambda: known)
    yield add
    disable()
