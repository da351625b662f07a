"""Exported checkpoints in vLLM, in its own environment (``make test-vllm`` builds it)."""

import pytest
import torch

pytest.importorskip("gptqmodel", reason="needs the gptq extra")

from rig.engines.with_vllm import VLLM, VLLMError, log_probabilities
from rig.quantizers.pipelines import PIPELINES
from rig.subjects import tiny
from rig.subjects.served import scores_of
from rig.subjects.tiny import sequences, tiny_checkpoint, tiny_tokenizer
from transformers import AutoModelForCausalLM

import bc_plugin
from bc_plugin import BiasCompensationError, Compensation

if not VLLM.exists():
    pytest.skip("needs vLLM's environment: make setup-vllm", allow_module_level=True)

EAGER = {"enforce_eager": True}  # biases are vLLM's own, compiled or not


def _by_transformers(folder, ids):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    return tiny.log_probabilities(model, torch.tensor(ids))


def _exported(folder, architecture, flag=None, bits=2, **options):
    """A compensated tiny model, and what is exported of it."""
    flag = flag or {"positions": 0, "joint": False}
    pipeline = PIPELINES["gptqmodel"]
    (folder / "float").mkdir()
    tiny_tokenizer().save_pretrained(folder / "float")
    source = tiny_checkpoint(folder / "float", architecture, torch.bfloat16)
    # Mostly two bits, so that the vectors are well above the engine's rounding.
    settings = {"bits": bits, "group_size": 32, **pipeline.settings}
    settings["sym"] = bits == 4  # vLLM has no kernel for 4 that are not
    bc_plugin.enable()
    try:
        result = pipeline.quantize(source, sequences(), flag, settings)
        pipeline.save(result, folder / "in")
    finally:
        bc_plugin.disable()
    bc_plugin.export(folder / "in", folder / "out", **{"engine": "vllm", **options})
    return folder / "in", folder / "out"


@pytest.mark.parametrize(
    ("architecture", "options"),
    [("llama", {}), ("opt", {}), ("qwen2", {"allow_partial": True}), ("qwen2", {"as_llama": True})],
    ids=["llama", "opt", "qwen2-partial", "qwen2-as-llama"],
)
def test_vllm_reads_every_bias(tmp_path, architecture, options):
    plain, exported = _exported(tmp_path, architecture, **options)
    ids = [item["input_ids"][0].tolist() for item in sequences(4, seed=9)]
    found = torch.tensor(log_probabilities(exported, ids, tmp_path, **EAGER))
    expected, without = (_by_transformers(folder, ids) for folder in (exported, plain))
    assert (found - expected).norm() < 0.5 * (found - without).norm()


def test_two_workers_read_the_same(tmp_path):
    _, exported = _exported(tmp_path, "llama")
    ids = [item["input_ids"][0].tolist() for item in sequences(4, seed=9)]
    one, two = (
        torch.tensor(log_probabilities(exported, ids, tmp_path, tensor_parallel_size=n, **EAGER))
        for n in (1, 2)
    )
    assert (one - two).abs().mean() < 0.05  # their bfloat16 sums are split differently


def test_what_vllm_would_drop_is_kept_for_the_plugin(tmp_path):
    plain, exported = _exported(tmp_path, "qwen2")
    assert len(Compensation.load(exported).vectors) == len(Compensation.load(plain).vectors)
    ids = [item["input_ids"][0].tolist() for item in sequences(4, seed=9)]
    found = torch.tensor(log_probabilities(exported, ids, tmp_path, **EAGER))
    expected, without = torch.stack(scores_of(plain, ids)), _by_transformers(plain, ids)
    assert (found - expected).norm() < 0.5 * (found - without).norm()


def test_what_vllm_would_drop_is_refused_as_biases_of_another_engine(tmp_path):
    with pytest.raises(BiasCompensationError, match=r"no bias stands for the output of a block"):
        _exported(tmp_path, "qwen2", engine="transformers")


REFINED = {"refine_steps": 2, "refine_train": ["vectors", "scales", "norms"]}


@pytest.mark.parametrize(
    ("bits", "refined"), [(3, {}), (4, {}), (4, REFINED)], ids=["3", "4", "4-refined"]
)
def test_joint_vectors_of_several_positions_are_served(tmp_path, bits, refined):
    flag = {"positions": 1, "joint": True, **refined}
    plain, exported = _exported(tmp_path, "llama", flag=flag, bits=bits)
    ids = [item["input_ids"][0].tolist() for item in sequences(4, seed=9)]
    found = torch.tensor(log_probabilities(exported, ids, tmp_path, **EAGER))
    expected = torch.stack(scores_of(plain, ids))
    assert (found - expected).abs().mean() < 0.1


def test_joint_weights_are_refused_without_the_plugin(tmp_path):
    _, exported = _exported(tmp_path, "llama", flag={"positions": 1, "joint": True}, bits=4)
    without = {"environment": {"VLLM_PLUGINS": "rig_kernels"}}
    with pytest.raises(VLLMError, match="bias_compensation"):
        log_probabilities(exported, [[5, 6, 7]], tmp_path, **without, **EAGER)
