"""Exported checkpoints in llama.cpp (``make test-llama-cpp`` fetches it)."""

import pytest
import torch

pytest.importorskip("gptqmodel", reason="needs the gptq extra")

from rig.engines import with_llama_cpp
from rig.quantizers.pipelines import PIPELINES
from rig.subjects import real
from rig.subjects.tiny import log_probabilities, tiny_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

import bc_plugin
from bc_plugin import Compensation

if not with_llama_cpp.CONVERTER.exists():
    pytest.skip("needs llama.cpp: make setup-llama-cpp", allow_module_level=True)


def _sequences(vocabulary, count, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocabulary, (1, 24), generator=generator) for _ in range(count)]


@pytest.mark.parametrize("toolkit", ["gptqmodel", "gptqmodel-awq"])
def test_llama_cpp_reads_every_bias(tmp_path, toolkit):
    found = PIPELINES[toolkit]
    tokenizer = AutoTokenizer.from_pretrained(real.smollm2())  # the converter knows this one
    source = tiny_checkpoint(tmp_path / "float", "llama", found.dtype, vocab_size=len(tokenizer))
    tokenizer.save_pretrained(source)
    calibration = [{"input_ids": ids} for ids in _sequences(len(tokenizer), 8, seed=0)]
    settings = {"bits": 4 if "awq" in toolkit else 2, "group_size": 32, **found.settings}
    bc_plugin.enable()
    try:
        result = found.quantize(source, calibration, {"positions": 0, "joint": False}, settings)
        found.save(result, tmp_path / "in")
    finally:
        bc_plugin.disable()
    tokenizer.save_pretrained(tmp_path / "in")
    bc_plugin.export(tmp_path / "in", tmp_path / "out", engine="llama.cpp")

    sequences = _sequences(len(tokenizer), 4, seed=9)
    ids = [row[0].tolist() for row in sequences]
    theirs = torch.tensor(with_llama_cpp.log_probabilities(tmp_path / "out", ids, tmp_path))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "in", dtype=torch.float32)
    plain = log_probabilities(model, torch.cat(sequences))
    Compensation.load(tmp_path / "in").attach_unchecked(model)
    expected = log_probabilities(model, torch.cat(sequences))
    # The rest is the rounding of kernels in half precision, AWQ's most of all.
    assert (theirs - expected).norm() < 0.4 * (theirs - plain).norm()
