"""What the command line says at its end: versions, errors, and how to go on when it is stopped."""

import signal
import subprocess
import sys

import pytest

import bc_plugin

COMMAND = (sys.executable, "-m", "bc_plugin")


def _run(*arguments, **options):
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, **options)


def test_version():
    done = _run("--version")
    assert (done.returncode, done.stdout) == (0, f"{bc_plugin.__version__}\n")


@pytest.mark.parametrize("name", ["layers.[a-b].txt", "pip install '.[gptq]'", "[red]", "a" * 200])
def test_a_message_is_no_markup_and_not_broken(tmp_path, name):
    (tmp_path / "float").mkdir()
    (tmp_path / "float" / "config.json").write_text("{}")
    done = _run("evaluate", "float", "--dataset", name, cwd=tmp_path)
    assert done.returncode == 1
    assert f"error: dataset {name!r} is neither" in done.stderr


# Signals. Nothing heavy is needed to be stopped.

WAITING = """
import signal, sys, time, types
import bc_plugin
from bc_plugin.cli import main

def load_tokenizer(*_):
    print("waiting", flush=True)
    time.sleep(600)

signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever pytest was started with
for name in ("Compensation", "compensate", "enable", "record_float_logits", "refine"):
    setattr(bc_plugin, name, lambda *_: None)
for name in ("transformers", "bc_plugin.refinement.progress"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["transformers"].GPTQConfig = sys.modules[name].delete_progress = None
sys.modules[name].about_to_place = None
for name in ("quantize", "inputs"):
    sys.modules[f"bc_plugin.cli.{name}"].load_tokenizer = load_tokenizer
main()
"""
NOTHING, AGAIN = "nothing was written", "the same command goes on from new.refining"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("command", "left"),
    [
        (("quantize", "float", "new"), NOTHING),
        (("compensate", "quantized", "float", "new"), NOTHING),
        (("refine", "compensated", "float", "new"), AGAIN),
    ],
)
def test_a_signal_is_one_line_that_says_how_to_go_on(tmp_path, command, left, number):
    configs = {"float": "{}", "quantized": "{}", "compensated": '{"bias_compensation": {}}'}
    for name, config in configs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config)
    (tmp_path / "text.txt").write_text("text")
    before = sorted(tmp_path.iterdir())
    arguments = [sys.executable, "-c", WAITING, *command, "--dataset", "text.txt"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(arguments, cwd=tmp_path, **pipes) as process:
        assert process.stdout.readline() == "waiting\n"
        assert len(sorted(tmp_path.glob(".new.*"))) == 1
        process.send_signal(number)
        _, said = process.communicate()
    assert said == f"stopped by {number.name}; {left}.\n"
    assert process.returncode == 128 + number
    assert sorted(tmp_path.iterdir()) == before


def test_a_signal_that_is_ignored_stays_so(tmp_path):
    program = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
from bc_plugin.cli.stopped import stop_on_signals
stop_on_signals()
os.kill(os.getpid(), signal.SIGINT)
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
