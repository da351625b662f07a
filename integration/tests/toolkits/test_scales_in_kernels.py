"""Group scales and integers in real kernels: told apart, fitted, saved and loaded."""

from functools import partial

import pytest
import torch
from rig.quantizers.pipelines import PIPELINES, model_of
from rig.quantizers.with_compressed_tensors import round_to_nearest
from rig.subjects.tiny import logits, sequences, tiny_checkpoint, tiny_tokenizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import bc_plugin
from bc_plugin import Compensation, RefinementConfig
from bc_plugin.models.integers import integer_weights
from bc_plugin.models.modules import copy_of, dtype_of
from bc_plugin.models.words import packed_integers
from bc_plugin.names import SUFFIX
from bc_plugin.refinement.train import Training

FLAG = {"positions": 1, "held_out": 0.25}
LINEARS = [
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
]
CASES = [
    *(("transformers", {"bits": bits}) for bits in (2, 3, 4, 8)),
    ("transformers", {"bits": 3, "desc_act": True}),
    ("transformers", {"bits": 3, "sym": True, "group_size": -1}),
    ("gptqmodel", {"bits": 4}),
    ("gptqmodel-awq", {"bits": 4}),
    ("autoawq", {"bits": 4}),
    ("auto_gptq", {"bits": 2}),
    ("transformers-auto_gptq", {"bits": 3}),
]
TRAINED = {"refine_steps": 8, "refine_train": ("vectors", "scales", "norms")}
PACKED = [{}, {"symmetric": False}, {"actorder": True}]


def _quantized(pipeline, source, folder, flag, **changes):
    settings = {"group_size": 32, **pipeline.settings, **changes}
    result = pipeline.quantize(source, sequences(), flag, settings)
    compensation = Compensation.attached_to(model_of(result))
    pipeline.save(result, folder)
    return compensation


@pytest.fixture(params=CASES, ids=[f"{name} {settings}" for name, settings in CASES])
def case(request, tmp_path):
    """A pipeline, a float model, and settings."""
    name, settings = request.param
    pipeline = PIPELINES[name]
    if not pipeline.installed:
        pytest.skip(f"{name} is not in this environment")
    tiny_tokenizer().save_pretrained(tmp_path / "float")
    source = tiny_checkpoint(tmp_path / "float", dtype=pipeline.dtype)
    with pipeline.on_cpu():
        yield pipeline, source, settings


def test_a_kernel_multiplies_with_integers_times_scales(case, tmp_path, enabled):
    pipeline, source, settings = case
    _quantized(pipeline, source, tmp_path / "out", None, **settings)
    model = pipeline.load(tmp_path / "out")
    _check_kernels(model_of(model))


@pytest.mark.parametrize("what", ["scales", "integers"])
@pytest.mark.parametrize("settings", PACKED, ids=str)
def test_compressed_tensors(settings, what, tmp_path, enabled):
    pytest.importorskip("compressed_tensors", reason="needs other quantizers")
    source = tiny_checkpoint(tmp_path / "float")
    round_to_nearest(source, tmp_path / "quantized", **settings)
    _check_kernels(AutoModelForCausalLM.from_pretrained(tmp_path / "quantized"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    reference = AutoModelForCausalLM.from_pretrained(source)
    plain = bc_plugin.compensate(model, reference, sequences(), FLAG)
    fitted = bc_plugin.compensate(model, reference, sequences(), {**FLAG, what: True})
    assert fitted.scales
    linears = [name for name, kind in plain.kinds.items() if kind == "linear"]
    ratios = [fitted.errors[name].after / plain.errors[name].after for name in linears]
    assert sum(ratios) / len(ratios) < 1
    fitted.attach(model)
    model.save_pretrained(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert Compensation.attached_to(loaded).scales
    torch.testing.assert_close(logits(loaded), logits(model))


@torch.no_grad()
def _check_kernels(model):
    """Before anything has run them, and so repacked what they hold."""
    block, dtype = model.model.layers[1], dtype_of(model)
    before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    found = integer_weights(block, LINEARS, copy_of, dtype)
    packed = {p: packed_integers(p, block.get_submodule(p), found[p]) for p in found}
    for path, weight in found.items():
        weight.write(weight.scales)
        packed[path].write(weight.integers)
    after = block.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    for factor in (1.0, None):
        for weight in found.values():
            change = factor or torch.rand_like(weight.scales) + 0.5
            weight.write(weight.rounded(weight.scales * change))
        twin = copy_of(block)
        for path, weight in found.items():
            linear = twin.get_submodule(path)
            inputs = torch.randn(8, weight.integers.shape[1]).to(dtype)
            dense = weight.integers * weight.scales[:, weight.groups]
            expected = inputs.double() @ dense.T
            # Kernels of AWQ multiply in half precision.
            apart = (linear(inputs).double() - expected).norm()
            assert apart < 5e-3 * expected.norm(), path


@pytest.mark.parametrize("what", ["scales", "integers"])
def test_they_are_fitted_in_the_same_run(case, what, tmp_path, enabled):
    pipeline, source, settings = case
    flag = {**FLAG, "joint": False}
    if what == "integers":  # GPTQ has seen what would be held out
        flag["held_out"] = 0
    plain = _quantized(pipeline, source, tmp_path / "plain", flag, **settings)
    fitted = _quantized(pipeline, source, tmp_path / "out", {**flag, what: True}, **settings)
    assert fitted.scales and fitted.joint and not plain.scales
    ours, theirs = (
        {k: v for f in (tmp_path / name).glob("*.safetensors") for k, v in load_file(f).items()}
        for name in ("out", "plain")
    )
    changed = {name for name in theirs if not torch.equal(ours[name], theirs[name])}
    expected = {"scales", "qweight"} if what == "integers" else {"scales"}
    assert {name.rpartition(".")[2] for name in changed if not name.endswith(SUFFIX)} == expected
    ratios = [
        fitted.errors[name].after / plain.errors[name].after
        for name, kind in plain.kinds.items()
        if kind == "linear" and f"{name}.scales" in changed
    ]
    assert ratios and sum(ratios) / len(ratios) < 1
    loaded = Compensation.attached_to(pipeline.load(tmp_path / "out"))
    assert loaded.scales and loaded.digest == fitted.digest


def test_what_was_trained_is_what_its_kernels_give_once_loaded(
    case, tmp_path, enabled, monkeypatch
):
    pipeline, source, settings = case
    losses, evaluate = [], Training.evaluate

    def better_and_better(training):  # so that where training ends is kept
        losses.append(evaluate(training))
        return -float(len(losses))

    with monkeypatch.context() as patched:
        patched.setattr(Training, "evaluate", better_and_better)
        fast = partial(RefinementConfig, scales_learning_rate=0.2, norms_learning_rate=0.2)
        patched.setattr("bc_plugin.toolkits.run.RefinementConfig", fast)
        flag = {**FLAG, "joint": False, "scales": True, **TRAINED}
        trained = _quantized(pipeline, source, tmp_path / "out", flag, **settings)
    assert trained.refined["train"] == list(TRAINED["refine_train"])
    assert losses[-1] != pytest.approx(losses[0], rel=0.005)
    model = model_of(pipeline.load(tmp_path / "out"))
    assert Compensation.attached_to(model).digest == trained.digest
    reference = AutoModelForCausalLM.from_pretrained(source, dtype=pipeline.dtype)
    config = RefinementConfig(steps=1, learning_rate=1e-9)
    again = bc_plugin.refine(model, reference, sequences(), config)
    assert again.refined["before"] == pytest.approx(losses[-1], rel=0.03)
