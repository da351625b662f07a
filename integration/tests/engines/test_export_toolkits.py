"""Export of what the toolkits wrote: standard checkpoints that need no plugin."""

import json

import pytest
import torch

pytest.importorskip("gptqmodel", reason="needs the gptq extra")

from gptqmodel import GPTQModel
from rig.quantizers.pipelines import PIPELINES
from rig.subjects.tiny import logits, sequences, tiny_checkpoint, tiny_tokenizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import bc_plugin
from bc_plugin import BiasCompensationError, Compensation
from bc_plugin.cli import app
from bc_plugin.models.packed import integers_of, pack, unpack


def _compensated(folder, toolkit="transformers", architecture="llama", **settings):
    found = PIPELINES[toolkit]
    (folder / "float").mkdir()
    tiny_tokenizer().save_pretrained(folder / "float")
    source = tiny_checkpoint(folder / "float", architecture, found.dtype)
    settings = {"bits": 4, "group_size": 32, **found.settings, **settings}
    bc_plugin.enable()
    try:
        with found.on_cpu():
            result = found.quantize(source, sequences(), {"positions": 0}, settings)
            found.save(result, folder / "in")
            tiny_tokenizer().save_pretrained(folder / "in")
    finally:
        bc_plugin.disable()
    return folder / "in"


def _with_plugin(folder, vectors=True):
    bc_plugin.enable("transformers")
    try:
        model = AutoModelForCausalLM.from_pretrained(folder)
    finally:
        bc_plugin.disable()
    compensation = Compensation.attached_to(model)
    if not vectors:
        compensation.detach(model)
    return logits(model)


@pytest.mark.parametrize("toolkit", ["transformers", "gptqmodel", "gptqmodel-awq", "autoawq"])
def test_every_current_toolkit(tmp_path, toolkit):
    if not PIPELINES[toolkit].installed:
        pytest.skip(f"{toolkit} is not installed")
    folder = _compensated(tmp_path, toolkit)
    bc_plugin.export(folder, tmp_path / "out")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    plain = _with_plugin(folder, vectors=False)
    expected = _with_plugin(folder)
    assert (logits(exported) - expected).norm() < 0.2 * (plain - expected).norm()
    for path in (tmp_path / "out").glob("*config.json"):
        assert "bias_compensation" not in path.read_text()


@pytest.mark.parametrize("architecture", ["llama", "opt"])
@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [2, 3])
def test_narrow_weights_are_widened_without_change(tmp_path, bits, sym, architecture):
    folder = _compensated(tmp_path, bits=bits, sym=sym, architecture=architecture)
    bc_plugin.export(folder, tmp_path / "out", engine="vllm")
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (settings["bits"], settings["sym"], settings["format"]) == (4, True, "gptq")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = _with_plugin(folder)
    # Another kernel, which rounds inputs to bfloat16.
    assert (logits(exported) - expected).norm() < 0.03 * expected.norm()
    (quantized,) = (
        m for n, m in exported.named_modules() if n.endswith(("0.mlp.up_proj", "0.fc1"))
    )
    assert quantized.bits == 4


@pytest.mark.parametrize(
    ("toolkit", "settings"),
    [("transformers", {"bits": 3}), ("transformers", {"desc_act": True}), ("autoawq", {})],
    ids=["3 bits", "desc_act", "awq"],
)
def test_fused_linears_become_a_llamas(tmp_path, toolkit, settings):
    folder = _compensated(tmp_path, toolkit, "phi3", **settings)
    bc_plugin.export(folder, tmp_path / "out", as_llama=True)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(exported).__name__ == "LlamaForCausalLM"
    assert exported.model.layers[0].mlp.down_proj.bias.any()
    plain, expected = _with_plugin(folder, vectors=False), _with_plugin(folder)
    assert (logits(exported) - expected).norm() < 0.2 * (plain - expected).norm()


@pytest.mark.parametrize("settings", [{"bits": 4, "sym": False}, {"bits": 8, "sym": False}])
def test_what_vllm_has_no_kernel_for_is_refused(tmp_path, settings):
    folder = _compensated(tmp_path, **settings)
    with pytest.raises(BiasCompensationError, match=r"no kernel for GPTQ with . bits and sym=F"):
        bc_plugin.export(folder, tmp_path / "out", engine="vllm")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("toolkit", "settings"),
    [
        ("gptqmodel", {"bits": 3}),
        ("gptqmodel", {"desc_act": True}),
        ("transformers", {}),
        ("gptqmodel-awq", {}),
        ("autoawq", {}),
    ],
    ids=["3 bits", "desc_act", "gptq_v2", "awq", "autoawq"],
)
def test_llama_cpp_gets_float_weights(tmp_path, toolkit, settings):
    folder = _compensated(tmp_path, toolkit, **settings)
    bc_plugin.export(folder, tmp_path / "out", engine="llama.cpp")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(exported.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert not hasattr(exported.config, "quantization_config")
    assert not (tmp_path / "out" / "quantize_config.json").exists()
    expected = _with_plugin(folder)
    # Another kernel, which does not round inputs to half precision.
    assert (logits(exported) - expected).norm() < 0.03 * expected.norm()


def test_gptqmodel_loads_it_too(tmp_path):
    folder = _compensated(tmp_path, "gptqmodel")
    bc_plugin.export(folder, tmp_path / "out")
    theirs = GPTQModel.load(str(tmp_path / "out"), device="cpu").model
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=theirs.dtype)
    assert (logits(theirs) - logits(ours)).norm() < 0.05 * logits(ours).norm()


def test_on_the_command_line(tmp_path):
    folder = _compensated(tmp_path)
    arguments = ["export", str(folder), str(tmp_path / "out"), "--for", "llama.cpp"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert "verified in a process without the plugin" in " ".join(result.stdout.split())
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["model.layers.0.mlp.down_proj.bias"].any()
    assert not any(name.endswith("bias_compensation") for name in tensors)


@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_integers_are_what_gptqmodel_packed(bits, layout):
    from gptqmodel import QuantizeConfig
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    generator = torch.Generator().manual_seed(0)
    values = torch.randint(2**bits, (64, 32), generator=generator)
    zeros = torch.randint(2**bits, (2, 32), generator=generator)
    zeros[0, 5] = 0  # in a format that stores it less one
    groups = torch.arange(64) // 32
    linear = torch.nn.Linear(64, 32, bias=False)
    linear.weight.data = (values - zeros[groups]).T.float()
    packed = TorchLinear(
        bits=bits,
        group_size=32,
        sym=False,
        desc_act=False,
        in_features=64,
        out_features=32,
        bias=False,
        pack_dtype=torch.int32,
        register_buffers=True,
    )
    packed.pack_original(linear, torch.ones(32, 2), zeros.T.float(), groups.int())
    if layout == "gptq":
        convert_gptq_v2_to_v1_format_module(packed, QuantizeConfig(bits=bits, group_size=32))
    tensors = {f"linear.{name}": tensor for name, tensor in packed.state_dict().items()}
    settings = {"quant_method": "gptq", "bits": bits, "format": layout}
    found = integers_of(tensors, "linear", settings)
    assert all(torch.equal(a, b) for a, b in zip(found, (values, zeros, groups), strict=True))


def test_packing_is_unpacked_again():
    values = torch.randint(16, (64, 24), generator=torch.Generator().manual_seed(0))
    for dim in (0, 1):
        assert torch.equal(unpack(pack(values, 4, dim=dim), 4, dim=dim), values)
