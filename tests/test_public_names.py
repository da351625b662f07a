"""The public names: there when asked for, and nothing heavy before."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import bc_plugin


def _run(program: str) -> None:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_package_alone_imports_nothing_heavy():
    _run("import sys, bc_plugin; assert not {'torch', 'transformers', 'wrapt'} & set(sys.modules)")


@pytest.mark.parametrize("name", bc_plugin.__all__)
def test_every_name_is_there(name):
    assert getattr(bc_plugin, name).__name__ == name
    assert name in dir(bc_plugin)


def test_type_checkers_see_the_same_names():
    tree = ast.parse(Path(bc_plugin.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert sorted(seen) == sorted(bc_plugin.__all__)
    assert seen == {name: bc_plugin._MODULES.get(name, name) for name in seen}


@pytest.mark.parametrize(
    "program",
    [
        "import bc_plugin.compensate, bc_plugin; assert callable(bc_plugin.compensate)",
        "import bc_plugin.toolkits.run, bc_plugin; assert callable(bc_plugin.compensate)",
        "from bc_plugin.refine import refine; import bc_plugin; assert bc_plugin.refine is refine",
        "from bc_plugin import export; import bc_plugin.export; assert callable(bc_plugin.export)",
        "import bc_plugin; bc_plugin.enabled(); assert callable(bc_plugin.enable)",
        "import bc_plugin; assert callable(bc_plugin.calibration.windows)",
        "from bc_plugin import *; assert callable(compensate) and callable(refine)",
    ],
)
def test_a_function_is_found_where_its_file_has_its_name(program):
    _run(program)


def test_what_is_not_there_is_an_attribute_error():
    assert not hasattr(bc_plugin, "nothing")
    assert not hasattr(bc_plugin, "__wrapped__")
