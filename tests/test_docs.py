"""The documentation says what is: links, paths, names, commands, settings and examples."""

import ast
import itertools
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from helpers import images
from helpers.examples import ROOT, check_command, check_python
from helpers.language import crudely_quantized, tiny_model, token_batches
from helpers.pages import Block, Page, code_in, first_columns

import bc_plugin
from bc_plugin import BiasCompensationConfig
from bc_plugin.supported import SUPPORTED

PATHS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = {path: Page(path, path.relative_to(ROOT).as_posix()) for path in PATHS}
BLOCKS = [block for page in PAGES.values() for block in page.blocks]
README, CONTRIBUTING = list(PAGES.values())[:2]
FOLDERS = ("bc_plugin/", "patches/", "tests/", "integration/", "docs/")
COMMANDS = ("bc-plugin ", "make ", "python ", "pip ")


def _cases(found, prefix=()):
    """Every page with each of the things found in it that start so."""
    return [
        pytest.param(page, thing, id=f"{page.name}: {thing}")
        for page in PAGES.values()
        for thing in dict.fromkeys(found(page))
        if thing.startswith(prefix or "")
    ]


def _blocks(language):
    return [pytest.param(b, id=b.place) for b in BLOCKS if b.language == language]


# Text


def test_the_first_page_stays_short():
    assert len(README.path.read_text().splitlines()) <= 140


@pytest.mark.parametrize(("page", "link"), _cases(lambda page: page.links))
def test_a_link_leads_somewhere(page, link):
    if link.startswith("https://"):
        return
    file, _, anchor = link.partition("#")
    target = (page.path.parent / file).resolve() if file else page.path
    assert target.exists()
    assert not anchor or anchor in PAGES[target].sections


@pytest.mark.parametrize(("page", "path"), _cases(lambda page: page.spans, FOLDERS))
def test_a_path_exists(page, path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize(("page", "code"), _cases(lambda page: page.spans, "bc_plugin."))
def test_a_name_exists(page, code):
    check_python(code)


@pytest.mark.parametrize(("page", "line"), _cases(lambda page: page.spans, COMMANDS))
def test_a_command_in_the_text_is_known(page, line):
    check_command(line)


def test_the_settings_are_those_of_the_config():
    known = {field.name: field.default for field in fields(BiasCompensationConfig)}
    rows = first_columns(README.sections["settings"], 2)
    assert rows
    for key, default in rows:
        assert known[key.strip("`")] == ast.literal_eval(default.strip("`")), key


@pytest.mark.parametrize("toolkit", SUPPORTED.values(), ids=SUPPORTED)
def test_the_versions_are_those_supported(toolkit):
    section = PAGES[ROOT / "docs" / "toolkits.md"].sections["versions"]
    for versions in toolkit.versions:
        assert f"{toolkit.distribution} {_said(versions)}" in section


def _said(versions):
    """``>=5.16,<5.24`` in words: 5.16-5.23."""
    first, _, end = versions.lstrip(">=").removesuffix(".*").partition(",<")
    major, _, minor = end.rpartition(".")
    last = f"{major}.{int(minor) - 1}" if end else first
    return first if first == last else f"{first}-{last}"


def test_every_part_of_the_package_has_its_line():
    package = Path(bc_plugin.__file__).parent
    files = {path.name for path in package.glob("*.py")}
    folders = {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    table = CONTRIBUTING.sections["where-things-are"].partition("And beside it")[0]
    named = list(itertools.chain(*(code_in(cell) for (cell,) in first_columns(table, 1))))
    assert sorted(named) == sorted(files | folders | {"patches/"})


# Blocks of code


def test_a_block_says_what_it_is():
    assert {block.language for block in BLOCKS} == {"python", "sh"}


@pytest.mark.parametrize("block", _blocks("sh"))
def test_commands_are_known(block: Block):
    for line in block.text.splitlines():
        check_command(line)


@pytest.mark.parametrize("block", _blocks("python"))
def test_python_fits_the_package(block: Block):
    if "bc_plugin.llmcompressor" in block.text:  # the one module of ours that imports a toolkit
        pytest.importorskip("llmcompressor", reason="needs llm-compressor")
    check_python(block.text)


def _a_quantized_model():
    model = tiny_model()
    return {
        "bc_plugin": bc_plugin,
        "quantized_model": crudely_quantized(model),
        "float_model": model,
        "calibration": token_batches(),
    }


def _a_compensated_model():
    names = _a_quantized_model()
    model = names["model"] = names.pop("quantized_model")
    bc_plugin.compensate(model, names["float_model"], names["calibration"]).attach(model)
    return names


def _an_image_model():
    model = images.tiny("vit")
    return {
        "model": model,
        "images": torch.cat([batch["pixel_values"] for batch in images.inputs("vit")]),
        "quantize": crudely_quantized,
        "load": lambda folder: crudely_quantized(model),
    }


# What needs no toolkit is run, with what the text around it takes as given.
RUN = {
    "README.md#a-checkpoint-you-already-have": _a_quantized_model,
    "docs/refinement.md#refinement": _a_compensated_model,
    "docs/vision.md#vision-models-and-encoders": _an_image_model,
}


@pytest.mark.parametrize("place", RUN)
def test_an_example_runs(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (example,) = [b.text for b in BLOCKS if (b.place, b.language) == (place, "python")]
    exec(compile(example, place, "exec"), RUN[place]())
