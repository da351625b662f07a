"""The layout holds: a file imports only from lower bands, or from its own package.

Functions' bodies count as well: an import hidden there is an import all the same.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import bc_plugin

ROOT = Path(bc_plugin.__file__).parent
PATCHES = ROOT.parent / "patches"
# From the ground up. A package stands for all of its files; "" is the package itself.
BANDS = (
    ("errors", "names", "marks"),
    ("files", "texts", "config", "supported", "ranks"),
    ("models",),
    ("vectors", "calibration"),
    ("shift", "refinement", "engines", "gguf", "streaming"),
    ("costs",),
    ("compensate", "refine", "export", "evaluate", "plan"),
    ("toolkits",),
    ("llmcompressor",),
    ("patches", "serving"),
    ("enable",),
    ("",),
    ("auto",),
    ("cli",),
    ("__main__",),
)
BAND = {room: number for number, rooms in enumerate(BANDS) for room in rooms}


def _files() -> dict[str, Path]:
    """Every module, by its dotted name within the package."""
    found = {("patches", *p.relative_to(PATCHES).parts): p for p in PATCHES.glob("*.py")}
    found |= {p.relative_to(ROOT).parts: p for p in ROOT.rglob("*.py")}
    return {
        ".".join(parts).removesuffix(".py").removesuffix("__init__").removesuffix("."): path
        for parts, path in found.items()
    }


FILES = _files()


def _imports(module: str) -> Iterator[str]:
    """The modules of the package that ``module`` imports."""
    path = FILES[module]
    package = module.split(".") if path.stem == "__init__" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            whole = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = ["bc_plugin", *filter(None, package)][: 1 - node.level or None]
            source = ".".join([*(parts if node.level else ()), *filter(None, [node.module])])
            whole = [f"{source}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in whole:
            if name.split(".")[0] == "bc_plugin":
                inside = name.removeprefix("bc_plugin").removeprefix(".")
                yield inside if inside in FILES else inside.rpartition(".")[0]


def _room(module: str) -> str:
    return module.split(".")[0]


def test_every_file_has_a_band():
    assert {_room(module) for module in FILES} == set(BAND)


@pytest.mark.parametrize("module", sorted(FILES))
def test_imports_go_down(module):
    imported = set(_imports(module))
    assert imported <= set(FILES), "there is no such module"
    elsewhere = {name for name in imported if _room(name) != _room(module)}
    assert [name for name in elsewhere if BAND[_room(name)] >= BAND[_room(module)]] == []


def test_no_circles():
    below = {module: set(_imports(module)) - {module} for module in FILES}
    while below:
        free = [module for module, names in below.items() if not names & set(below)]
        assert free, f"these import each other: {sorted(below)}"
        for module in free:
            del below[module]
