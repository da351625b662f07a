"""What is attached is what each toolkit saves, in every order; repacked weights are not saved."""

import json
import shutil

import pytest
import torch

pytest.importorskip("gptqmodel", reason="needs the gptq extra")

from gptqmodel import GPTQModel
from rig.quantizers.pipelines import PIPELINES
from rig.subjects.tiny import logits, sequences, text, tiny_checkpoint, tiny_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPTQConfig
from typer.testing import CliRunner

import bc_plugin
from bc_plugin import BiasCompensationError, Compensation
from bc_plugin.cli import app
from bc_plugin.names import KEY

SETTINGS = {"bits": 4, "group_size": 32}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A float model, and GPTQ of it: plain, and compensated."""
    folder = tmp_path_factory.mktemp("saving")
    source = tiny_checkpoint(folder / "float")
    tiny_tokenizer().save_pretrained(source)
    bc_plugin.enable()
    for name, flag in (("plain", None), ("compensated", {"positions": 1, "joint": False})):
        config = GPTQConfig(**SETTINGS, dataset=sequences(), bias_compensation=flag)
        model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
        model.config.quantization_config.dataset = None
        model.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    bc_plugin.disable()
    return folder


@pytest.fixture
def float_model(folders):
    return AutoModelForCausalLM.from_pretrained(folders / "float")


def _same(folder, compensation):
    stored = Compensation.load(folder)
    return stored.entry() == compensation.entry() and all(
        torch.equal(stored.vectors[name], vectors) for name, vectors in compensation.vectors.items()
    )


def _changed(compensation):
    vectors = {name: 0.5 * vectors for name, vectors in compensation.vectors.items()}
    refined = {"by": "model", "steps": 1, "before": 1.0, "after": 0.5}
    return compensation.replaced(vectors=vectors, refined=refined)


@pytest.mark.parametrize("order", ["attached", "refined", "detached", "recomputed"])
def test_gptqmodel(folders, tmp_path, enabled, float_model, order):
    start = "plain" if order == "attached" else "compensated"
    qmodel = GPTQModel.load(str(folders / start), device="cpu")
    compensation = Compensation.attached_to(qmodel)
    if compensation is not None:
        compensation.detach(qmodel)
    if order == "refined":
        compensation = _changed(compensation)
        compensation.attach(qmodel.model)
    elif order != "detached":
        compensation = bc_plugin.compensate(
            qmodel.model, float_model, sequences(), {"positions": 0}
        )
        compensation.attach(qmodel.model)
    qmodel.save(str(tmp_path / "out"))
    if order == "detached":
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert Compensation.attached_to(loaded) is None
        with pytest.raises(BiasCompensationError, match="holds no compensation"):
            Compensation.load(tmp_path / "out")
        return
    assert _same(tmp_path / "out", compensation)
    loaded = GPTQModel.load(str(tmp_path / "out"), device="cpu")
    assert Compensation.attached_to(loaded).entry() == compensation.entry()
    assert Compensation.attached_to(qmodel).entry() == compensation.entry()


@pytest.mark.skipif(not PIPELINES["autoawq"].installed, reason="needs AutoAWQ")
@pytest.mark.parametrize("attached", [True, False])
def test_autoawq(folders, tmp_path, enabled, float_model, attached):
    toolkit = PIPELINES["autoawq"]
    with toolkit.on_cpu():
        flag = None if attached else {"sites": "block"}
        awq = toolkit.quantize(str(folders / "float"), sequences(), flag, SETTINGS)
        if attached:
            compensation = bc_plugin.compensate(
                awq.model, float_model, sequences(), {"sites": "block"}
            )
            compensation.attach(awq.model)
        else:
            compensation = Compensation.attached_to(awq.model)
            compensation.detach(awq.model)
        toolkit.save(awq, tmp_path / "out")
        loaded = Compensation.attached_to(toolkit.load(tmp_path / "out"))
    assert (loaded is not None) == attached
    assert not attached or _same(tmp_path / "out", compensation)


@pytest.mark.parametrize("leaf", ["qweight", "qzeros", "scales", "g_idx", "layernorm.weight"])
def test_any_changed_weight_is_refused(folders, tmp_path, enabled, leaf):
    folder = shutil.copytree(folders / "compensated", tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    key = next(key for key in tensors if key.endswith(leaf))
    tensors[key].view(-1)[1] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for load in (AutoModelForCausalLM.from_pretrained, lambda f: GPTQModel.load(str(f))):
        with pytest.raises(BiasCompensationError, match=r"model.safetensors are not those"):
            load(folder)


def test_other_scales_in_memory_are_refused(folders, enabled):
    compensation = Compensation.load(folders / "compensated")
    model = AutoModelForCausalLM.from_pretrained(folders / "plain", dtype=torch.bfloat16)
    compensation.attach(model)  # the type they were loaded in makes no difference
    compensation.detach(model)
    for module in model.model.layers[1].modules():
        if hasattr(module, "scales"):
            module.scales *= 1.05
    with pytest.raises(BiasCompensationError, match="block 1 has other scales"):
        compensation.attach(model)


def test_vectors_beside_a_plain_checkpoint(folders, tmp_path, enabled):
    folder = shutil.copytree(folders / "plain", tmp_path / "out")
    Compensation.load(folders / "compensated").save(folder)
    for load in (AutoModelForCausalLM.from_pretrained, lambda f: GPTQModel.load(str(f)).model):
        assert Compensation.attached_to(load(folder)) is None


def test_repacked_weights_are_refused(folders, tmp_path, enabled, float_model):
    model = AutoModelForCausalLM.from_pretrained(folders / "plain")
    compensation = bc_plugin.compensate(model, float_model, sequences())
    compensation.attach(model)
    logits(model)  # its kernel repacks when first run
    with pytest.raises(BiasCompensationError, match=r"TorchAten\w+\) are not stored any more"):
        model.save_pretrained(tmp_path / "out")
    compensation.detach(model)
    with pytest.raises(BiasCompensationError, match="bc-plugin compensate"):
        bc_plugin.compensate(model, float_model, sequences())


@pytest.fixture
def shuffling(monkeypatch):
    """The CPU kernel, which at loading permutes its words in place, as ExLlama's does on a GPU."""
    from gptqmodel.nn_modules.qlinear.torch_aten_kernel import TorchAtenLinear as Kernel

    initialise, forward = Kernel.post_init, Kernel.forward

    def post_init(self, *args, **kwargs):
        initialise(self, *args, **kwargs)
        self.as_stored = self.qweight.clone()
        self.qweight.copy_(self.qweight.roll(1, 0))

    def run(self, x):
        if self.qweight.shape == self.as_stored.shape:
            self.qweight.data = self.as_stored.clone()
        return forward(self, x)

    monkeypatch.setattr(Kernel, "post_init", post_init)
    monkeypatch.setattr(Kernel, "forward", run)


def test_words_permuted_in_place_are_noticed(folders, enabled, float_model, shuffling):
    model = AutoModelForCausalLM.from_pretrained(folders / "plain")
    with pytest.raises(BiasCompensationError, match="has repacked them"):
        bc_plugin.compensate(model, float_model, sequences())


@pytest.mark.parametrize("command", ["compensate", "refine"])
def test_the_command_line_writes_the_files_own_weights(
    folders, tmp_path, enabled, shuffling, command
):
    data = tmp_path / "text.txt"
    data.write_text("\n".join(text(sequences(12))))
    source = folders / ("plain" if command == "compensate" else "compensated")
    more = ["--steps", "2", "--train", "vectors"] if command == "refine" else []
    out = tmp_path / "out"
    arguments = [command, source, folders / "float", out, "--dataset", data, "--length", 24, *more]
    CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    rest = {name for name in before if not name.endswith(KEY)}
    assert rest == {name for name in after if not name.endswith(KEY)}
    assert all(torch.equal(before[name], after[name]) for name in rest)
    assert (out / "tokenizer.json").is_file()
    assert json.loads((out / "config.json").read_text())["quantization_config"][KEY]
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert Compensation.attached_to(loaded).entry() == Compensation.load(out).entry()


def test_a_checkpoint_of_several_files(folders, tmp_path, enabled):
    shards = tmp_path / "shards"
    model = AutoModelForCausalLM.from_pretrained(folders / "compensated")
    model.save_pretrained(shards, max_shard_size="50KB")
    tiny_tokenizer().save_pretrained(shards)
    compensation = Compensation.load(folders / "compensated")
    from bc_plugin.toolkits.copy import copy_compensated

    out = tmp_path / "out"
    out.mkdir()
    copy_compensated(shards, out, _changed(compensation), model)
    assert len(list(out.glob("*.safetensors"))) > 2
    assert _same(out, _changed(compensation))
    for load in (AutoModelForCausalLM.from_pretrained, lambda f: GPTQModel.load(str(f)).model):
        loaded = Compensation.attached_to(load(out))
        assert loaded.entry() == _changed(compensation).entry()


@pytest.mark.parametrize(
    ("bits", "sym", "joint"), [(2, False, True), (3, False, False), (8, True, False)]
)
def test_zero_points_are_saved_as_they_are_labelled(
    folders, tmp_path, enabled, float_model, bits, sym, joint
):
    """GPTQModel's files have them less one; its kernels, in whatever loads them, as they are."""
    pipeline = PIPELINES["gptqmodel"]
    settings = {"bits": bits, "group_size": 32, **pipeline.settings, "sym": sym}
    flag = {"positions": 1} if joint else None
    pipeline.save(
        pipeline.quantize(str(folders / "float"), sequences(), flag, settings), tmp_path / "made"
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    if not joint:
        compensation = bc_plugin.compensate(model, float_model, sequences(), {"positions": 1})
        compensation.attach(model)
    before = logits(model)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(model), before)
    made, saved = (load_file(tmp_path / name / "model.safetensors") for name in ("made", "saved"))
    zeros = [name for name in made if name.endswith("qzeros")]
    assert zeros
    assert all(torch.equal(made[name], saved[name]) for name in zeros)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), before)
