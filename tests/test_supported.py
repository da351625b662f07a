"""Versions of toolkits are said once; whatever else names them agrees."""

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from bc_plugin.supported import SUPPORTED, VLLM

ROOT = Path(__file__).parent.parent
tomllib = pytest.importorskip("tomllib")  # Python 3.11


def _extras():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [
        (extra, Requirement(text))
        for extra, texts in project["optional-dependencies"].items()
        for text in texts
    ]


@pytest.mark.parametrize(("extra", "requirement"), _extras(), ids=str)
def test_extras_install_what_is_supported(extra, requirement):
    known = {s.distribution: s.versions for s in (*SUPPORTED.values(), VLLM)}
    if requirement.name not in known:
        pytest.skip("no toolkit")
    exact = [s.version for s in requirement.specifier if s.operator == "=="]
    ranges = known[requirement.name]
    if exact:
        assert any(SpecifierSet(range_).contains(exact[0]) for range_ in ranges)
    else:
        assert requirement.specifier in [SpecifierSet(range_) for range_ in ranges]


@pytest.mark.parametrize("toolkit", SUPPORTED)
def test_patches_take_their_versions_from_there(toolkit):
    source = (ROOT / "patches" / f"{toolkit}.py").read_text(encoding="utf-8")
    assert f'supported=SUPPORTED["{toolkit}"]' in source
    headings = re.findall(r"^# (Config|Quantizing|Saving|Loading|Toolkit)\b", source, re.M)
    assert headings == ["Config", "Quantizing", "Saving", "Loading", "Toolkit"]
