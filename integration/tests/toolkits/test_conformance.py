"""What every toolkit has to do alike. Each runs in the environment that has it."""

import copy
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from rig.folders import INTEGRATION
from rig.quantizers.pipelines import PIPELINES, model_of
from rig.subjects.tiny import logits, sequences, tiny_checkpoint, tiny_tokenizer
from safetensors.torch import load_file, save_file

import bc_plugin
from bc_plugin import BiasCompensationError, Compensation
from bc_plugin.enable import _toolkits
from bc_plugin.models.modules import copy_of, dtype_of
from bc_plugin.names import SUFFIX
from bc_plugin.refinement.gradients import differentiable
from bc_plugin.refinement.gradients import weight_through as dequantized
from bc_plugin.toolkits.patch import Applied
from bc_plugin.vectors.sealed import NEEDS

FLAG = {"positions": 1, "held_out": 0.25}
NAME = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module", params=PIPELINES)
def pipeline(request):
    found = PIPELINES[request.param]
    if not found.installed:
        pytest.skip(f"{found.name} is not in this environment")
    with found.on_cpu():
        yield found


@pytest.fixture(scope="module")
def source(pipeline, tmp_path_factory):
    """A float model."""
    folder = tmp_path_factory.mktemp("float")
    tiny_tokenizer().save_pretrained(folder)
    return tiny_checkpoint(folder, dtype=pipeline.dtype)


def _quantize(pipeline, source, flag, **changes):
    settings = {"bits": 4, "group_size": 32, **pipeline.settings, **changes}
    return pipeline.quantize(source, sequences(), flag, settings)


@pytest.fixture(scope="module")
def saved(pipeline, source, tmp_path_factory):
    """A compensated checkpoint, its vectors, and the logits before saving."""
    folder = tmp_path_factory.mktemp("saved") / "out"
    bc_plugin.enable()
    try:
        result = _quantize(pipeline, source, FLAG)
        compensation = Compensation.attached_to(model_of(result))
        pipeline.save(result, folder)
        before = logits(model_of(result))  # after saving: some kernels repack their weights
    finally:
        bc_plugin.disable()
    return folder, compensation, before


def _tensors(folder):
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def test_the_option_adds_vectors_and_changes_nothing_else(pipeline, source, tmp_path, enabled):
    plain = _quantize(pipeline, source, None)
    assert Compensation.attached_to(model_of(plain)) is None
    pipeline.save(plain, tmp_path / "plain")
    compensated = _quantize(pipeline, source, {**FLAG, "joint": False})
    pipeline.save(compensated, tmp_path / "compensated")
    compensation = Compensation.attached_to(model_of(compensated))
    assert not compensation.joint
    assert all(e.after <= e.before for e in compensation.errors.values())
    ours, theirs = _tensors(tmp_path / "compensated"), _tensors(tmp_path / "plain")
    assert set(ours) - set(theirs) == {name + SUFFIX for name in compensation.vectors}
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_it_loads_compensated(pipeline, saved, enabled):
    folder, compensation, before = saved
    model = pipeline.load(folder)
    assert Compensation.attached_to(model).digest == compensation.digest
    if pipeline.exact:
        torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)


def test_a_new_process_loads_it_by_its_name_on_the_hub(pipeline, saved, tmp_path, enabled):
    """The hub's cache is filled by hand; nothing is downloaded."""
    folder, _, _ = saved
    repository = tmp_path / "hub" / "models--someone--compensated"
    shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    program = (
        "import sys, torch, bc_plugin; bc_plugin.enable()\n"
        "from rig.subjects.tiny import logits; from rig.quantizers.pipelines import PIPELINES\n"
        "pipeline = PIPELINES[sys.argv[1]]\n"
        "with pipeline.on_cpu():\n"
        "    torch.save(logits(pipeline.load('someone/compensated')), sys.argv[2])"
    )
    command = [sys.executable, "-c", program, pipeline.name, tmp_path / "logits.pt"]
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub")}
    subprocess.run(command, check=True, cwd=INTEGRATION, env=environment)
    expected = logits(pipeline.load(folder))
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=1e-5, atol=1e-5)


def test_without_the_plugin_joint_weights_do_not_load_and_others_load_plain(pipeline, saved):
    folder, compensation, _ = saved
    bc_plugin.enable()
    compensated = logits(pipeline.load(folder))
    bc_plugin.disable()
    if compensation.joint:
        # AutoGPTQ does not show the value that it refuses.
        shown = "only support quantize to" if pipeline.name == "auto_gptq" else r"bc_plugin.enable"
        with pytest.raises(ValueError, match=shown):
            pipeline.load(folder)
        return
    plain = pipeline.load(folder)
    assert Compensation.attached_to(plain) is None
    assert (logits(plain) - compensated).abs().max() > 1e-2


def test_every_config_file_carries_the_entry(pipeline, saved):
    folder, compensation, _ = saved
    entries = 0
    for path in folder.glob("*config.json"):
        settings = json.loads(path.read_text())
        settings = settings.get("quantization_config", settings)
        if "bits" in settings or "config_groups" in settings:
            entries += 1
            assert settings["bias_compensation"]["digest"] == compensation.digest
            assert (NEEDS in path.read_text()) == compensation.joint
    assert entries


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop(NAME + SUFFIX), f"missing, the first is {NAME}{SUFFIX}"),
        (lambda s: s[NAME + SUFFIX].fill_(torch.nan), f"{NAME}{SUFFIX} holds NaN"),
        (lambda s: _packed(s).add_(1), "digest"),
    ],
    ids=["missing", "nan", "requantized"],
)
def test_a_checkpoint_with_something_wrong_is_refused(
    pipeline, saved, tmp_path, enabled, change, message
):
    for file in saved[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (file,) = tmp_path.glob("*.safetensors")
    state = load_file(file)
    change(state)
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(BiasCompensationError, match=message):
        pipeline.load(tmp_path)


def _packed(tensors):
    return tensors.get(NAME + ".qweight", tensors.get(NAME + ".weight_packed"))


@pytest.mark.parametrize("flag", [{"position": 1}, 3, {"positions": -1}])
def test_a_wrong_flag_is_refused(pipeline, source, enabled, flag):
    with pytest.raises(BiasCompensationError, match="bias_compensation"):
        _quantize(pipeline, source, flag)


def test_useless_calibration_data_is_refused_before_quantizing(pipeline, source, enabled):
    settings = {"bits": 4, "group_size": 32, **pipeline.settings}
    with pytest.raises(BiasCompensationError, match=r"longest calibration sequence|positions"):
        pipeline.quantize(source, sequences(length=24), {"positions": 24}, settings)


def test_joint_quantization_leaves_less_to_compensate(pipeline, source, saved, enabled):
    compensation = saved[1]
    assert compensation.joint == pipeline.joint
    if not compensation.joint:
        return
    result = _quantize(pipeline, source, {**FLAG, "joint": False})
    apart = Compensation.attached_to(model_of(result))
    ratio = [compensation.errors[name].after / apart.errors[name].after for name in apart.vectors]
    assert sum(ratio) / len(ratio) < 1.0


@pytest.mark.parametrize("by", ["model", "block"])
def test_vectors_are_refined_in_the_same_run(pipeline, source, tmp_path, enabled, by):
    flag = {**FLAG, "refine_steps": 2, "refine": by}
    result = _quantize(pipeline, source, flag)
    compensation = Compensation.attached_to(model_of(result))
    assert compensation.refined["by"] == by and compensation.refined["steps"] == 2
    assert compensation.refined["after"] <= compensation.refined["before"]
    pipeline.save(result, tmp_path / "out")
    loaded = Compensation.attached_to(pipeline.load(tmp_path / "out"))
    assert loaded.refined == compensation.refined
    assert all(torch.equal(loaded.vectors[n], v) for n, v in compensation.vectors.items())


def test_gradients_pass_through_its_kernels(pipeline, saved, enabled):
    """As through plain linears, although training looks at held-out data first, without any."""
    model = pipeline.load(saved[0])
    Compensation.attached_to(model).detach(model)
    block = copy_of(model.model.layers[0])
    mlp, dtype = block.mlp, dtype_of(model)
    torch.manual_seed(0)
    inputs, gradient = torch.randn(2, 1, 8, 128).to(dtype)
    plain = copy.deepcopy(mlp).float()
    for name, kernel in mlp.named_children():
        if hasattr(kernel, "in_features"):
            weight = dequantized(copy_of(kernel), kernel.in_features, inputs).float()
            linear = torch.nn.Linear(*weight.shape, bias=False)
            linear.weight.data = weight.T
            setattr(plain, name, linear)

    def gradient_of(module, dtype):
        leaf = inputs.to(dtype, copy=True).requires_grad_()
        return torch.autograd.grad(module(leaf), leaf, gradient.to(dtype))[0].float()

    with torch.compiler.set_stance("force_eager"), differentiable([block], dtype, False):
        with torch.no_grad():
            mlp(inputs)
        found = gradient_of(mlp, dtype)
    expected = gradient_of(plain, torch.float32)
    assert (found - expected).norm() < 0.05 * expected.norm()


def test_disable_leaves_no_trace(pipeline):
    def everything():
        return {
            each.target: id(vars(applied.parent).get(applied.attribute))
            for known in _toolkits().values()
            if known.supported.version
            for patch in known.patches
            for each in patch.each()
            for applied in [Applied(known, each)]
        }

    before = everything()
    assert bc_plugin.enable() == bc_plugin.enable()
    assert all(everything()[target] != before[target] for target in before)
    bc_plugin.disable()
    assert everything() == before
