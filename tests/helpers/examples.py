"""Examples in the documentation that no test can run: do they name what there is?"""

from __future__ import annotations

import ast
import inspect
import itertools
import pkgutil
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import typer

from bc_plugin import BiasCompensationConfig
from bc_plugin.cli import app

ROOT = Path(__file__).parents[2]


def check_python(code: str) -> None:
    """Every name of the package exists, and every call fits its signature.

    Raises:
        Exception: of one kind or another, saying what does not.
    """
    tree = ast.parse(code)
    known: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == "bc_plugin":
            for name in node.names:
                known[name.asname or name.name] = _find(f"{node.module}.{name.name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            dotted = ast.unparse(node)
            if re.fullmatch(r"bc_plugin(\.\w+)+", dotted):
                known[dotted] = _find(dotted)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in known:
            keywords = {keyword.arg: keyword.value for keyword in node.keywords}
            inspect.signature(known[ast.unparse(node.func)]).bind(*node.args, **keywords)
    for value in _options(tree):
        BiasCompensationConfig.parse(ast.literal_eval(value))


def _find(dotted: str) -> Any:
    module, _, name = dotted.rpartition(".")
    return getattr(pkgutil.resolve_name(module), name)


def _options(tree: ast.AST) -> Iterator[ast.expr]:
    """What is given to toolkits as their ``bias_compensation``, as a keyword or in a dict."""
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "bias_compensation":
            yield node.value
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == "bias_compensation":
                    yield value


def check_command(line: str) -> None:
    """A line of a shell: its program may be used here, and is given what it knows.

    Raises:
        Exception: of one kind or another, saying what it does not know.
    """
    words = shlex.split(line, comments=True)
    while re.match(r"[A-Z_]+=", words[0]):  # the environment
        words.pop(0)
    program, arguments = Path(words[0]).name, words[1:]
    assert program in CHECKS, f"{program} is not among {sorted(CHECKS)}"
    CHECKS[program](arguments)


def _bc_plugin(arguments: Sequence[str]) -> None:
    name, *rest = arguments
    commands = typer.main.get_command(app).commands
    assert name in commands, f"bc-plugin has no command {name}"
    commands[name].make_context(name, rest)  # parses, and runs nothing


def _torchrun(arguments: Sequence[str]) -> None:
    module = arguments.index("-m")
    assert arguments[module + 1] == "bc_plugin"
    _bc_plugin(arguments[module + 2 :])


def _make(arguments: Sequence[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^([\w-]+):", makefile, re.MULTILINE)
    for word in arguments:
        variable, is_set, _ = word.partition("=")
        known = f"$({variable})" in makefile if is_set else word in targets
        assert known, f"the Makefile has no {variable}"


def _python(arguments: Sequence[str]) -> None:
    if arguments[0] != "-m":
        assert (ROOT / arguments[0]).is_file(), f"there is no {arguments[0]}"
        return
    assert arguments[1] == "pytest"
    for before, word in itertools.pairwise(arguments[1:]):
        if before != "-k" and not word.startswith("-"):
            assert (ROOT / word).exists(), f"there is no {word}"


def _pip(arguments: Sequence[str]) -> None:
    assert arguments[0] == "install"
    project = (ROOT / "pyproject.toml").read_text()
    for extra in re.findall(r"\.\[(\w+)\]", " ".join(arguments)):
        assert f"\n{extra} = [" in project, f"pyproject.toml has no extra {extra}"


def _serve(arguments: Sequence[str]) -> None:
    assert arguments[0] == "serve"


def _llama_server(arguments: Sequence[str]) -> None:
    assert set(arguments[::2]) <= {"--model", "--control-vector"}


CHECKS = {
    "bc-plugin": _bc_plugin,
    "torchrun": _torchrun,
    "make": _make,
    "python": _python,
    "pip": _pip,
    "vllm": _serve,
    "llama-server": _llama_server,
}
