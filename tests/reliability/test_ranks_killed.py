"""A rank that is killed ends the others; OUT is whole or absent, and the same command goes on."""

import hashlib
import os
import signal
import sys
from functools import partial
from pathlib import Path

import pytest
import torch.distributed as dist
from helpers.checkpoints import LENGTH, write_inputs
from helpers.killed import KILLED, kill_at, kill_this
from helpers.ranks import as_launched
from helpers.reliability.cases import Case, chosen
from helpers.reliability.counts import count

from bc_plugin.cli import inputs, main
from bc_plugin.compensate import _Pass
from bc_plugin.refinement import float_logits
from bc_plugin.refinement.progress import Progress
from bc_plugin.refinement.train import Training
from bc_plugin.toolkits import copy

DATA = ("--dataset", "{0}/text.txt", "--length", LENGTH, "--device-map", "cpu")
COMMANDS = {
    "compensate": ("compensate", "{0}/quantized", "{0}/float", "{1}", *DATA),
    "refine": ("refine", "{0}/compensated", "{0}/float", "{1}", *DATA, "--steps", 24),
}
EARLY = [
    (dist, "init_process_group", 1, True),
    (inputs, "load_model", 2),
    (dist, "all_gather_object", 2),
]
ON_FIRST = [
    (copy, "copy_compensated", 1, True),
    (Path, "rename", 1),
    (Path, "rename", 1, True),
]
# Of a function the call that is the last one, or is not made any more. At first what is under way
# when half of the work is done, since that is what a sample takes.
MOMENTS = {
    "compensate": [
        (dist, "all_reduce", 3),
        (_Pass, "_compensate_block", 1),
        (_Pass, "_compensate_block", 3, True),
        (dist, "barrier", 1),  # the first rank writes meanwhile
        *EARLY,
        *ON_FIRST,
    ],
    "refine": [
        (Training, "_step", 11),
        (float_logits, "save_file", 1, True),
        (Progress, "write", 2, True),
        (dist, "barrier", 2),
        *EARLY,
        *ON_FIRST,
    ],
}
CASES = [
    Case(
        f"{command}, {who} killed",
        f"{number}: {moment[1]}",
        (command, who, number, 0 if moment in ON_FIRST else number % 2),
    )
    for command, moments in MOMENTS.items()
    for who in ("one rank", "all ranks")
    for number, moment in enumerate(moments)
]


def _run(rank, command, folder, room, who="nobody", number=0, victim=0):
    os.dup2(os.open(f"{room}.{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    Path(f"{room}.{rank}.pid").write_text(str(os.getpid()))
    if who == "all ranks":
        kill_at(*MOMENTS[command][number], kill=partial(_kill_all, room))
    elif who == "one rank" and rank == victim:
        kill_at(*MOMENTS[command][number])
    words = (str(word).format(folder, room / "out") for word in COMMANDS[command])
    sys.stdout, sys.argv = sys.stderr, ["bc-plugin", *words]
    main()


def _kill_all(room):
    for path in room.parent.glob(f"{room.name}.*.pid"):
        if int(path.read_text()) != os.getpid():
            os.kill(int(path.read_text()), signal.SIGKILL)
    kill_this()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder, 9)
    return folder


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """Of a command, its files when nothing stops it."""
    known = {}

    def of(command):
        if command not in known:
            room = tmp_path_factory.mktemp("whole") / "room"
            assert as_launched(2, _run, command, folder, room) == [0, 0]
            known[command] = _files(room / "out")
        return known[command]

    return of


def _files(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def _outcome(case, folder, room, expected):
    command, who, number, victim = case.run
    try:
        codes = as_launched(2, _run, command, folder, room, who, number, victim)
        if codes != [KILLED if who == "all ranks" or rank == victim else 1 for rank in (0, 1)]:
            return "unclear", f"it ended with {codes}"
        if (room / "out").exists():
            if _files(room / "out") != expected:
                return "half-written", f"{sorted(_files(room / 'out'))}"
            (room / "out").rename(room.with_name("first"))
        if as_launched(2, _run, command, folder, room) != [0, 0]:
            return "unclear", Path(f"{room}.0.log").read_text()[-1000:]
    except TimeoutError as error:
        return "hang", str(error)
    if _files(room / "out") != expected:
        return "silent", "run again it wrote other files"
    left = [path.name for path in room.iterdir() if path.name != "out"]
    return ("left over", f"{left}") if left else ("right", "")


@pytest.mark.parametrize("case", chosen(CASES), ids=str)
def test_ranks_killed(case, folder, whole, tmp_path):
    room = tmp_path / "room"
    room.mkdir()
    outcome, said = _outcome(case, folder, room, whole(case.run[0]))
    count(case, outcome, said)
    assert outcome == "right", said
