"""AutoAWQ's own pipeline, beyond what every toolkit has to do."""

import warnings

import pytest
import torch

pytest.importorskip("awq", reason="needs the awq extra")

from awq import AutoAWQForCausalLM
from awq.models import base
from awq.modules.linear import gemm
from rig.cpu_shims import autoawq_on_cpu
from rig.subjects.tiny import logits, sequences, tiny_checkpoint, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import bc_plugin
from bc_plugin import BiasCompensationError, Compensation

CONFIG = {"w_bit": 4, "q_group_size": 32, "version": "GEMM"}


@pytest.fixture(scope="module", autouse=True)
def _on_cpu():
    with autoawq_on_cpu():
        yield


def _quantize(source, flag=True, **options):
    awq = AutoAWQForCausalLM.from_pretrained(source, torch_dtype=torch.float16)
    awq.quantize(
        AutoTokenizer.from_pretrained(source),
        quant_config={**CONFIG, "bias_compensation": flag},
        calib_data=[item["input_ids"][0].tolist() for item in sequences()],
        max_calib_seq_len=24,
        **options,
    )
    return awq


@pytest.fixture(scope="module")
def saved(tmp_path_factory, _on_cpu):
    """A float folder and a compensated one."""
    folder = tmp_path_factory.mktemp("awq")
    tiny_tokenizer().save_pretrained(folder / "float")
    source = tiny_checkpoint(folder / "float", dtype=torch.float16)
    bc_plugin.enable()
    try:
        _quantize(source).save_quantized(str(folder / "out"))
    finally:
        bc_plugin.disable()
    return source, str(folder / "out")


def test_it_quantizes_the_weights_it_was_given(tmp_path, enabled):
    """AutoAWQ on a CPU would quantize weights that its search had left rescaled; see the shim."""
    tiny_tokenizer().save_pretrained(tmp_path)
    source = tiny_checkpoint(tmp_path, dtype=torch.float16)
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float16)
    with torch.no_grad():  # columns of different sizes, which AWQ has scales for
        for layer in original.model.layers:
            weight = layer.mlp.gate_proj.weight
            weight *= torch.linspace(0.1, 4, weight.shape[1])
    original.save_pretrained(source)
    block = _quantize(source, flag=None).model.model.layers[0]
    packed = block.mlp.gate_proj
    weight = gemm.dequantize_gemm(packed.qweight, packed.qzeros, packed.scales, 4, 32).T
    found = weight.float() * block.post_attention_layernorm.weight
    block = original.model.layers[0]
    given = block.mlp.gate_proj.weight.float() * block.post_attention_layernorm.weight
    assert (found - given).norm() < 0.15 * given.norm()


def test_linears_whose_output_is_rescaled_are_left_alone(saved):
    sites = {name.partition("layers.")[2] for name in Compensation.load(saved[1]).vectors}
    kept = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj"}
    assert {f"{i}.{name}" for i in (0, 1) for name in kept} < sites
    assert {"0", "1", "0.mlp.down_proj"} < sites
    assert not any(site.endswith("up_proj") for site in sites)


def test_transformers_loads_it_compensated(saved, enabled):
    _, out = saved
    ours = AutoAWQForCausalLM.from_quantized(out, device_map={"": "cpu"}, fuse_layers=False).model
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float16)
    compensation = Compensation.attached_to(theirs)
    assert compensation.entry() == Compensation.attached_to(ours).entry()
    together = (logits(ours) - logits(theirs)).abs().max()
    Compensation.attached_to(ours).detach(ours)
    compensation.detach(theirs)
    # Their kernels round differently, with the vectors and without.
    assert together < 1.5 * (logits(ours) - logits(theirs)).abs().max()


def test_fused_layers_are_left_out_with_a_warning(saved, enabled):
    _, out = saved
    with pytest.warns(UserWarning, match="fused layers cannot carry"):
        loaded = AutoAWQForCausalLM.from_quantized(out, device_map={"": "cpu"})
    assert Compensation.attached_to(loaded.model) is not None
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*fused layers cannot carry")
        AutoAWQForCausalLM.from_quantized(out, device_map={"": "cpu"}, fuse_layers=False)


def test_scales_alone_cannot_be_compensated(saved, enabled):
    with pytest.raises(BiasCompensationError, match="export_compatible"):
        _quantize(saved[0], export_compatible=True)


def test_a_cpu_is_refused(saved, enabled, monkeypatch):
    monkeypatch.setattr(base, "get_best_device", lambda: "cpu")
    with pytest.raises(BiasCompensationError, match="wrongly on a CPU"):
        _quantize(saved[0])


def test_without_the_flag_nothing_changes(saved, tmp_path, enabled):
    awq = _quantize(saved[0], flag=None)
    awq.save_quantized(str(tmp_path / "plain"))
    assert Compensation.attached_to(awq.model) is None
    AutoAWQForCausalLM.from_quantized(str(tmp_path / "plain"), device_map={"": "cpu"})
