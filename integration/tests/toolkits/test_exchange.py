"""Checkpoints that AutoGPTQ wrote in the legacy environment, loaded in the current one."""

import pytest
import torch

pytest.importorskip("gptqmodel", reason="needs the gptq extra")

from rig.folders import CACHE
from rig.subjects.tiny import logits
from transformers import AutoModelForCausalLM, GPTQConfig

from bc_plugin import Compensation


@pytest.mark.parametrize("bits", [3, 4])
def test_a_checkpoint_of_auto_gptq_loads_in_transformers(enabled, bits):
    folder = CACHE / "exchange" / f"auto_gptq-{bits}bit"
    if not (folder / "logits.pt").exists():
        pytest.skip("run test_legacy_transformers.py in the legacy environment first")
    # The kernel that is the same on every processor; that of 4 bits rounds inputs to bfloat16, too.
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        quantization_config=GPTQConfig(bits=bits, backend="gptq_torch"),
    )
    assert Compensation.attached_to(model) is not None
    expected = torch.load(folder / "logits.pt")
    difference = (logits(model) - expected).abs().max() / expected.abs().max()
    assert difference < 0.005  # scales are of float16
