"""``bc-plugin run``: programs that do not know of the plugin."""

import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from bc_plugin.cli import app

ENABLED = "import transformers, bc_plugin; assert 'transformers' in bc_plugin.enabled()"


def _run(*command, **environment):
    program = [sys.executable, "-c", "from bc_plugin.cli import main; main()", "run", "--"]
    return subprocess.run(
        [*program, *command],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def test_a_program_and_its_children_are_enabled():
    again = f"subprocess.run([sys.executable, '-c', {ENABLED!r}], check=True)"
    child = f"import subprocess, sys; {ENABLED}; {again}"
    done = _run(sys.executable, "-c", child)
    assert done.returncode == 0, done.stderr


def test_it_costs_nothing_where_no_toolkit_is_imported():
    program = "import sys; assert not {'torch', 'bc_plugin', 'transformers'} & set(sys.modules)"
    done = _run(sys.executable, "-c", program)
    assert done.returncode == 0, done.stderr


def test_options_exit_code_and_output_are_the_programs():
    program = "import sys; print(sys.argv[1:]); sys.exit(7)"
    done = _run(sys.executable, "-c", program, "--bits", "3", "--help")
    assert done.returncode == 7
    assert done.stdout.strip() == "['--bits', '3', '--help']"


def test_another_sitecustomize_is_run_too(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import builtins; builtins.was_here = True\n")
    done = _run(sys.executable, "-c", "assert was_here", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr


def test_an_unknown_program_is_refused():
    with pytest.raises(Exception, match="no program 'no-such-program'"):
        CliRunner().invoke(app, ["run", "--", "no-such-program"], catch_exceptions=False)
