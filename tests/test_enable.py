"""Enabling and disabling, on a toolkit made for the purpose."""

import subprocess
import sys

import pytest
from helpers.toolkit import PATCHED, PLAIN, Class, results

from bc_plugin import BiasCompensationError, disable, enable


def test_enabling_twice_wraps_once(toolkits):
    toolkits("one")
    enable()
    enable("one")
    assert results() == PATCHED
    disable()
    assert results() == PLAIN
    disable()


def test_a_toolkit_brings_along_what_it_needs(toolkits):
    toolkits("one", targets=("method",), needs=("two", "absent"))
    toolkits("absent", distribution="no-such-distribution")
    toolkits("two", targets=("double",), needs=("one", "four"))
    toolkits("three", targets=("build",))
    toolkits("four", targets=())
    assert set(enable("one")) == {"one", "two", "four"}
    assert results() == (-1, 1, (Class, 1), -2)


def test_toolkits_that_are_not_installed_are_passed_over(toolkits):
    toolkits("one")
    toolkits("absent", distribution="no-such-distribution")
    assert enable() == ("one",)
    with pytest.raises(BiasCompensationError, match=r"not installed.*no-such-distribution>=1"):
        enable("absent")


def test_unknown_names_and_empty_environments_are_refused(toolkits):
    with pytest.raises(BiasCompensationError, match="no toolkit is installed"):
        enable()
    toolkits("one")
    with pytest.raises(BiasCompensationError, match=r"unknown toolkits \['two'\].*\['one'\]"):
        enable("two")


def test_importing_patches_nothing():
    program = (
        "import bc_plugin, bc_plugin.patches, sys; assert bc_plugin.enabled() == (); "
        "assert not {'transformers', 'optimum', 'gptqmodel', 'auto_gptq'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
