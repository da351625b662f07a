"""Where the rig finds things: wrong folders would skip tests, or train and fetch anew."""

from types import SimpleNamespace

import pytest
from rig.engines import with_llama_cpp, with_vllm
from rig.folders import INTEGRATION, REPOSITORY


def test_folders_are_those_of_the_repository():
    assert (REPOSITORY / "pyproject.toml").is_file()
    assert (INTEGRATION / "environments" / "current.txt").is_file()


def test_workers_are_beside_what_starts_them():
    assert with_vllm.WORKER.is_file()
    assert with_llama_cpp.WORKER.is_file()


def test_a_row_of_the_comparison_that_failed_is_measured_again(monkeypatch, capsys):
    monkeypatch.syspath_prepend(INTEGRATION / "benchmarks")
    comparison = pytest.importorskip("comparison", reason="needs the current toolkits")
    from comparison_variants import Variant

    part = SimpleNamespace(bits=4, seed=0, found={})
    part.keep = part.found.__setitem__
    made = []

    def make(part, name):
        made.append(name)
        if made.count("first") == 1:
            raise OSError("no room")
        part.keep(name, {"perplexity": 1.0})

    rows = {"first": Variant("", make), "second": Variant("", make, "first")}
    monkeypatch.setattr(comparison, "VARIANTS", rows)
    comparison.measure(part, "first")
    assert part.found == {"first": {"error": "OSError: no room"}}
    assert "no room" in capsys.readouterr().err
    comparison.measure(part, "second")
    comparison.measure(part, "second")
    assert made == ["first", "first", "second"]
    assert part.found == {name: {"perplexity": 1.0} for name in rows}
