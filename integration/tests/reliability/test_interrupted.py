"""A command that is stopped leaves OUT whole or absent, and run again, nothing beside it."""

import hashlib
import signal

import pytest
from helpers.reliability.cases import Case, chosen
from helpers.reliability.counts import count

pytest.importorskip("gptqmodel", reason="needs the gptq extra")

from rig import interrupted
from rig.subjects.tiny import tiny_inputs

MOMENTS = 20
DATA = ("--dataset", "{inputs}/text.txt", "--samples", 4, "--length", 24)
COMMANDS = {
    "quantize": ("{inputs}/float", "{out}", *DATA, "--bits", 4, "--group-size", 32),
    "compensate": ("{inputs}/quantized", "{inputs}/float", "{out}", *DATA),
    "refine": ("{inputs}/quantized", "{inputs}/float", "{out}", *DATA, "--steps", 2),
    "export": ("{inputs}/plain", "{out}"),
}
SIGNALS = {
    signal.SIGKILL: range(MOMENTS),
    signal.SIGTERM: range(MOMENTS),
    signal.SIGINT: range(0, MOMENTS, 4),
}
# From the middle on, so that a sample is of a moment at which something is being written.
ORDER = sorted(range(MOMENTS), key=lambda moment: (moment - MOMENTS // 2) % MOMENTS)
CASES = [
    Case(
        f"{command} stopped",
        f"{number.name} at moment {moment + 1} of {MOMENTS}",
        (command, number, moment),
    )
    for command in COMMANDS
    for number, moments in SIGNALS.items()
    for moment in ORDER
    if moment in moments
]


def _arguments(command, inputs, out):
    filled = [str(word).format(inputs=inputs, out=out) for word in COMMANDS[command]]
    return [command, *filled]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A float model with its tokenizer, text, and quantized checkpoints of it."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny_inputs(folder, 12)
    for name, positions in (("quantized", 1), ("plain", 0)):
        arguments = _arguments("quantize", folder, folder / name)
        interrupted.run([*arguments, "--positions", positions], folder)
    return folder


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """Of a command, its files when nothing stops it, and when it touches files."""
    known = {}

    def of(command):
        if command not in known:
            room = tmp_path_factory.mktemp("whole")
            touches = interrupted.run(_arguments(command, inputs, room / "out"), room)
            known[command] = _files(room / "out"), touches
        return known[command]

    return of


def _files(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def _outcome(arguments, room, expected, at, number):
    """What is there once the command was stopped, and once it was run again."""
    out = room / "out"
    if interrupted.run(arguments, room, at, number) is None:
        return "hang", "stopped, it did not end"
    if out.exists():
        if _files(out) != expected:
            return "half-written", f"{sorted(_files(out))}"
        out.rename(room.with_name("first"))
    after = sorted(path.name for path in room.iterdir())
    try:
        if interrupted.run(arguments, room) is None:
            return "hang", "run again, it did not end"
    except RuntimeError as error:
        return "unclear", f"run again where there was {after}: {error}"
    if _files(out) != expected:
        return "silent", "run again it wrote other files"
    left = sorted(path.name for path in room.iterdir() if path != out)
    return ("left over", f"{left}") if left else ("right", "")


def _when(touches, moment):
    """The moments are spread over the touches of files; every other one is in between two."""
    number = moment * (len(touches) - 1) // (MOMENTS - 1)
    if moment % 2 == 0:
        return number, 0.0
    following = touches[min(number + 1, len(touches) - 1)]
    return number, (following - touches[number]) / 2


@pytest.mark.parametrize("case", chosen(CASES), ids=str)
def test_interrupted(case, inputs, whole, tmp_path):
    command, number, moment = case.run
    expected, touches = whole(command)
    room = tmp_path / "room"
    room.mkdir()
    at = _when(touches, moment)
    arguments = _arguments(command, inputs, room / "out")
    outcome, said = _outcome(arguments, room, expected, at, number)
    count(case, outcome, f"{at[1]:.2f} s after touch {at[0]} of {len(touches)}: {said}")
    assert outcome == "right", said
