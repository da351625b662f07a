"""What is seen of a process that prints all it can, and what is in its log."""

import os
import subprocess
import sys

import pytest
from rig.folders import INTEGRATION

PROGRAM = """
import atexit, ctypes, logging, os, subprocess, sys, threading
from pathlib import Path
from rig.quiet import quiet, step

def everything():
    print("noise of print")
    print("noise of standard error", file=sys.stderr)
    logging.warning("noise of logging")
    os.write(1, b"noise of descriptor 1\\n")
    os.write(2, b"noise of descriptor 2\\n")
    ctypes.CDLL(None).printf(b"noise of C\\n")  # which keeps it until the process ends
    subprocess.run(["sh", "-c", "echo noise of a child; echo noise of its errors >&2"])
    thread = threading.Thread(target=print, args=["noise of a thread"])
    thread.start()
    thread.join()
    atexit.register(print, "noise of the end")

print("before")
with quiet(Path(sys.argv[1])) as console:
    with step(console, "A step"):
        everything()
        if "fail" in sys.argv:
            print(*range(100), sep="\\n")
            print("a bar: 1%\\ra bar: 2%\\r", end="", flush=True)
            raise ValueError("broken")
    console.print("a table")
"""
NOISE = [
    f"noise of {source}"
    for source in (
        "print",
        "standard error",
        "logging",
        "descriptor 1",
        "descriptor 2",
        "C",
        "a child",
        "its errors",
        "a thread",
        "the end",
    )
]
# rich takes more from the environment, such as FORCE_COLOR.
ENVIRONMENT = {"PATH": os.environ["PATH"], "TERM": "xterm"}


def _run(*arguments, **streams):
    command = [sys.executable, "-c", PROGRAM, *arguments]
    return subprocess.run(command, cwd=INTEGRATION, env=ENVIRONMENT, text=True, **streams)


def test_noise_goes_to_the_log_and_each_step_is_said_once(tmp_path):
    log = tmp_path / "new" / "log.txt"
    done = _run(log, capture_output=True, check=True)
    assert done.stdout.splitlines() == ["before", "A step", "a table"]
    assert done.stderr == ""
    said = log.read_text()
    assert [noise for noise in NOISE if noise not in said] == []
    assert "A step" not in said and "a table" not in said


def test_a_terminal_shows_the_time_and_no_noise(tmp_path):
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    _run(tmp_path / "log.txt", stdout=theirs, stderr=theirs, check=True)
    os.close(theirs)
    seen = b""
    try:
        while part := os.read(ours, 4096):
            seen += part
    except OSError:  # which is how Linux tells the end
        pass
    finally:
        os.close(ours)
    seen = seen.decode()
    assert "✓ A step 0:00:0" in seen.replace("\x1b[33m", "").replace("\x1b[0m", "")
    assert "a table" in seen
    assert "noise" not in seen


def test_after_an_error_the_end_of_the_log_is_shown(tmp_path):
    done = _run(tmp_path / "log.txt", "fail", capture_output=True)
    assert done.returncode == 1
    assert done.stdout.splitlines() == ["before", "A step"]
    lines = done.stderr.splitlines()
    assert lines[0] == f"The end of {tmp_path / 'log.txt'}:"
    assert "noise of print" not in lines  # too long ago
    assert lines[lines.index("99") + 1] == "a bar: 2%"
    assert lines[-1] == "ValueError: broken"
