"""HQQ, which transformers 4.57 has on a CPU: its linears keep their state to themselves."""

import pytest
import torch

pytest.importorskip("hqq", reason="needs the environment with transformers 4.57")

import transformers
from rig.subjects.tiny import logits, sequences, tiny_checkpoint
from transformers import AutoModelForCausalLM, HqqConfig

import bc_plugin
from bc_plugin import BiasCompensationError, Compensation

if transformers.__version__.startswith("5."):
    pytest.skip("transformers 5 has HQQ on GPUs only", allow_module_level=True)

CPU = {"": "cpu"}


def _load(folder, **kwargs):
    return AutoModelForCausalLM.from_pretrained(
        folder, device_map=CPU, dtype=torch.float32, **kwargs
    )


def test_vectors_travel_beside_the_checkpoint(tmp_path, enabled):
    source = tiny_checkpoint(tmp_path / "float")
    model = _load(source, quantization_config=HqqConfig(nbits=4, group_size=32))
    compensation = bc_plugin.compensate(model, _load(source), sequences(), {"positions": 0})
    assert all(errors.after <= errors.before for errors in compensation.errors.values())
    model.save_pretrained(tmp_path / "out")
    compensation.save(tmp_path / "out")
    compensation.attach(model)
    loaded = _load(tmp_path / "out")
    Compensation.load(tmp_path / "out").attach(loaded)
    assert torch.equal(logits(loaded), logits(model))
    # Its linears write no tensors but their own, so attached vectors would be saved in part.
    with pytest.raises(BiasCompensationError, match="its 2 compensation tensors are not the 16"):
        model.save_pretrained(tmp_path / "attached")
