"""The judge tells every outcome from the others."""

import time

import pytest
import torch
from helpers.reliability import judge as module
from helpers.reliability.cases import DAMAGED, EITHER, HARMLESS, Case

from bc_plugin import BiasCompensationError

ONES = torch.ones(3)


def _raises(error):
    def run(room):
        raise error

    return run


NAMED, UNNAMED = BiasCompensationError("a.bin is cut"), BiasCompensationError("it is cut")
CASES = [
    (lambda room: (ONES, ONES), HARMLESS, "right"),
    (lambda room: (ONES, ONES), DAMAGED, "silent"),
    (lambda room: (ONES, ONES), EITHER, "right"),
    (lambda room: (ONES + 1e-4, ONES), EITHER, "silent"),
    (lambda room: (ONES[:2], ONES), HARMLESS, "silent"),
    (lambda room: (ONES * float("nan"), ONES), EITHER, "silent"),
    (_raises(NAMED), DAMAGED, "refused"),
    (_raises(NAMED), EITHER, "refused"),
    (_raises(NAMED), HARMLESS, "false refusal"),
    (_raises(UNNAMED), DAMAGED, "unclear"),
    (_raises(ValueError("a.bin")), EITHER, "unclear"),
    (lambda room: time.sleep(60), DAMAGED, "hang"),
    (lambda room: bytearray(1 << 40), DAMAGED, "unclear"),
]


@pytest.mark.parametrize(("run", "right", "outcome"), CASES)
def test_an_outcome(run, right, outcome, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SECONDS", 1)
    case = Case("family", "name", run, right, ("a.bin|a.txt",))
    assert module.judge(case, tmp_path)[0] == outcome


def test_a_loaders_own_error_has_to_name_as_well(tmp_path):
    case = Case("family", "name", _raises(ValueError("a.bin")), DAMAGED, ("a.bin",), anyone=True)
    assert module.judge(case, tmp_path)[0] == "refused"
