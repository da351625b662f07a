"""The package as others get it: built as a wheel, and run where only that wheel can be found."""

from __future__ import annotations

import shutil
import site
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it along

ROOT = Path(__file__).parents[1]
FOLDERS = {"bc_plugin": "bc_plugin", "patches": "bc_plugin/patches"}  # to where they are installed

# Run by an interpreter that knows the standard library only. An editable install, which would stand
# in for what the wheel lacks, hooks itself in by a .pth file; folders added here are searched for
# modules, and their .pth files are left alone.
ISOLATED = "import sys; sys.path += {path}"
# What derives from vLLM's classes is imported in vLLM's processes only, and found here; the package
# for llm-compressor's recipes wants llm-compressor.
IMPORT_ALL = """
import importlib.util, pkgutil, bc_plugin
found = pkgutil.walk_packages(bc_plugin.__path__, "bc_plugin.", onerror=lambda name: None)
names = [module.name for module in found]
for name in ["bc_plugin", *names]:
    engines = "bc_plugin.serving.", "bc_plugin.llmcompressor"
    if not name.startswith(engines) or name.endswith(".register"):
        __import__(name)
    print(name, importlib.util.find_spec(name).origin)
print(*(name for name in sys.modules if name in {extras}))
"""
COMMAND = """
import runpy
sys.argv = ["bc-plugin", {argument!r}]
runpy.run_path({script!r}, run_name="__main__")
"""
ARGUMENTS = ("--help", "--version")
EXTRAS = {
    "transformers",
    "optimum",
    "gptqmodel",
    "auto_gptq",
    "awq",
    "datasets",
    "vllm",
}


def _no_source(folder: str, names: list[str]) -> set[str]:
    """What is no part of the package's source: caches, and links that a developer made."""
    return {name for name in names if name == "__pycache__" or Path(folder, name).is_symlink()}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A clean copy of what a wheel is built from: no earlier build's leftovers."""
    copy = tmp_path_factory.mktemp("wheel") / "source"
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=_no_source)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture(scope="module")
def files(source) -> set[str]:
    """Every file of the package, where it should be installed."""
    return {
        f"{installed}/{path.relative_to(source / folder).as_posix()}"
        for folder, installed in FOLDERS.items()
        for path in (source / folder).rglob("*")
        if path.is_file()
    }


def _pip(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    subprocess.run([*map(str, command), "--no-deps", "--no-index"], check=True)


@pytest.fixture(scope="module")
def wheel(source, files) -> Path:
    """Made of the source package, as ``make dist`` does."""
    folder = source.parent
    build = f"from setuptools.build_meta import build_sdist; build_sdist({str(folder)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True)
    (packed,) = folder.glob("*.tar.gz")
    _pip("wheel", "--no-build-isolation", "--wheel-dir", folder, packed)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel) -> Path:
    folder = wheel.parent / "installed"
    _pip("install", "--target", folder, wheel)
    return folder


def _run(program: str, installed: Path) -> str:
    """What a program prints that finds the installed wheel, and the packages beside it."""
    program = ISOLATED.format(path=[str(installed), *site.getsitepackages()]) + program
    command = [sys.executable, "-I", "-S", "-c", program]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def test_pyproject_lists_every_package(files):
    with open(ROOT / "pyproject.toml", "rb") as file:
        listed = tomllib.load(file)["tool"]["setuptools"]["packages"]
    folders = {Path(name).parent for name in files if name.endswith(".py")}
    assert sorted(listed) == sorted(".".join(folder.parts) for folder in folders)


def test_the_wheel_holds_every_file(wheel, files):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == files
    assert "bc_plugin/py.typed" in names


def test_every_module_is_imported_from_the_wheel_and_needs_no_extra(installed, files):
    *modules, extras = _run(IMPORT_ALL.format(extras=EXTRAS), installed).splitlines()
    found = dict(line.split(" ", 1) for line in modules)
    modifier = "bc_plugin/llmcompressor/"  # nobody looks into a package that cannot be imported
    inside = {n for n in files if n.startswith(modifier) and n != f"{modifier}__init__.py"}
    assert set(found.values()) == {str(installed / n) for n in files - inside if n.endswith(".py")}
    assert extras == ""


def test_the_command_runs(wheel, installed):
    script = installed / "bin" / "bc-plugin"
    said = {a: _run(COMMAND.format(script=str(script), argument=a), installed) for a in ARGUMENTS}
    assert "compensate" in said["--help"]
    assert wheel.name.startswith(f"bc_plugin-{said['--version'].strip()}-")
