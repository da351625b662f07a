"""What is recorded while an AWQ toolkit applies its scales."""

import torch

from bc_plugin.marks import mark_of
from bc_plugin.shift.rescaling import Rescaling
from bc_plugin.toolkits.awq import record


def test_a_block_that_is_not_marked_is_left_alone():
    block = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 2)})
    record(block, [("a", ["b"], torch.ones(2))])
    assert mark_of(block, Rescaling) is None
