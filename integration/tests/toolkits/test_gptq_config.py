"""GPTQ through transformers' GPTQConfig and Optimum's GPTQQuantizer, with the real toolkits."""

import copy
import json

import pytest
import torch

pytest.importorskip("gptqmodel", reason="needs the gptq extra")

from optimum.gptq import GPTQQuantizer, load_quantized_model
from rig.subjects.tiny import logits, sequences, text, tiny_checkpoint, tiny_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, GPTQConfig

from bc_plugin import BiasCompensationConfig, BiasCompensationError, Compensation
from bc_plugin.names import SUFFIX

FLAG = {"positions": 1, "held_out": 0.25}


def _config(**changes):
    settings = {"bits": 4, "group_size": 32, "dataset": sequences(), "bias_compensation": FLAG}
    return GPTQConfig(**{**settings, **changes})


def _quantize(folder, tmp_path, **changes):
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=_config(**changes))
    model.config.quantization_config.dataset = None  # tensors, which JSON cannot hold
    return model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A float folder, a compensated one whose weights are worth something alone, its logits."""
    import bc_plugin

    folder = tmp_path_factory.mktemp("gptq")
    source = tiny_checkpoint(folder / "float")
    bc_plugin.enable()
    try:
        model = _quantize(source, folder, bias_compensation={**FLAG, "joint": False})
        model.save_pretrained(folder / "out")
    finally:
        bc_plugin.disable()
    return source, folder / "out", logits(model)


@pytest.mark.parametrize("architecture", ["llama", "opt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("positions", [0, 1])
def test_quantize_save_load(tmp_path, enabled, architecture, dtype, positions):
    source = tiny_checkpoint(tmp_path / "float", architecture, dtype)
    model = _quantize(source, tmp_path, bias_compensation={"positions": positions})
    compensation = Compensation.attached_to(model)
    assert all(e.after <= e.before for e in compensation.errors.values())
    model.save_pretrained(tmp_path / "out")
    before = logits(model)  # after saving: this kernel repacks its weights when first run
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert Compensation.attached_to(loaded).digest == compensation.digest
    assert torch.equal(logits(loaded), before)
    compensation.detach(model)
    assert not torch.equal(logits(model), before)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
def test_every_width(tmp_path, enabled, bits, sym):
    source = tiny_checkpoint(tmp_path / "float")
    model = _quantize(source, tmp_path, bits=bits, sym=sym)
    model.save_pretrained(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded), logits(model))


def test_without_the_plugin_the_plain_model_loads(checkpoint):
    _, out, compensated = checkpoint
    plain = AutoModelForCausalLM.from_pretrained(out)
    assert not torch.equal(logits(plain), compensated)
    plain = AutoModelForCausalLM.from_pretrained(out)
    Compensation.load(out).attach(plain)
    assert torch.equal(logits(plain), compensated)


def test_the_error_for_weights_that_a_kernel_has_repacked_says_so(checkpoint):
    plain = AutoModelForCausalLM.from_pretrained(checkpoint[1])
    logits(plain)
    with pytest.raises(BiasCompensationError, match="attach before running"):
        Compensation.load(checkpoint[1]).attach(plain)


def test_only_vectors_and_one_entry_are_added(checkpoint, tmp_path):
    _, out, _ = checkpoint
    plain = AutoModelForCausalLM.from_pretrained(out)
    plain.save_pretrained(tmp_path / "plain")
    ours, theirs = (load_file(f / "model.safetensors") for f in (out, tmp_path / "plain"))
    added = set(ours) - set(theirs)
    assert added and all(name.endswith(SUFFIX) for name in added)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    configs = [json.loads((f / "config.json").read_text()) for f in (out, tmp_path / "plain")]
    keys = [set(config["quantization_config"]) for config in configs]
    assert keys[0] - keys[1] == {"bias_compensation"}
    assert len(json.dumps(configs[0]["quantization_config"]["bias_compensation"])) < 4000


def test_sharded_and_saved_again(checkpoint, tmp_path, enabled):
    _, out, expected = checkpoint
    model = AutoModelForCausalLM.from_pretrained(out)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), expected)


def test_the_model_without_its_head(checkpoint, enabled):
    _, out, _ = checkpoint
    whole, base = AutoModelForCausalLM.from_pretrained(out), AutoModel.from_pretrained(out)
    batch = sequences(1)[0]
    with torch.no_grad():
        expected = whole.model(**batch).last_hidden_state
        assert torch.equal(base(**batch).last_hidden_state, expected)


@pytest.mark.parametrize(
    "flag",
    [True, {"sites": ["block"]}, BiasCompensationConfig(positions="all")],
    ids=["true", "dict", "config"],
)
def test_the_flag_takes_what_the_readme_says(checkpoint, tmp_path, enabled, flag):
    source, _, _ = checkpoint
    model = _quantize(source, tmp_path, bias_compensation=flag)
    assert Compensation.attached_to(model) is not None


@pytest.mark.parametrize("flag", [None, False])
def test_without_the_flag_nothing_changes(checkpoint, tmp_path, enabled, flag):
    source, _, _ = checkpoint
    model = _quantize(source, tmp_path, bias_compensation=flag)
    model.save_pretrained(tmp_path)
    assert Compensation.attached_to(model) is None
    config = json.loads((tmp_path / "config.json").read_text())
    assert "bias_compensation" not in config["quantization_config"]
    AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
def test_optimums_own_quantizer(tmp_path, enabled, sym):
    source = tiny_checkpoint(tmp_path / "float")
    model = AutoModelForCausalLM.from_pretrained(source)
    quantizer = GPTQQuantizer(
        bits=4, group_size=32, sym=sym, dataset=sequences(), bias_compensation=FLAG
    )
    model = quantizer.quantize_model(model)
    before = logits(copy.deepcopy(model))
    quantizer.dataset = None
    model.config.quantization_config["dataset"] = None
    quantizer.save(model, tmp_path / "out")
    entry = json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    assert entry["bias_compensation"]["digest"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded), before)
    empty = AutoModelForCausalLM.from_pretrained(source)
    empty = load_quantized_model(empty, tmp_path / "out", device_map={"": "cpu"})
    assert torch.equal(logits(empty), before)


def test_text_as_the_data_set(tmp_path, enabled):
    source = tiny_checkpoint(tmp_path / "float")
    config = _config(dataset=text(sequences()), tokenizer=tiny_tokenizer())
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    model.save_pretrained(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded), logits(model))


# What must not pass in silence


def _edited(out, folder, tensors=None, entry=None):
    """A copy of a compensated checkpoint with something wrong."""
    folder.mkdir()
    for file in out.iterdir():
        if file.name != "model.safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    state = load_file(out / "model.safetensors")
    if tensors:
        tensors(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    if entry:
        entry(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))
    return folder


NAME = "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"tensors": lambda s: s.update({NAME + SUFFIX: torch.zeros(2, 3)})},
            "are not those that the bias_compensation entry was written with",
        ),
        ({"entry": lambda c: c["bias_compensation"].update(format_version=99)}, "version 99"),
        ({"entry": lambda c: c.pop("bias_compensation")}, "has no bias_compensation entry"),
    ],
    ids=["shape", "newer", "no-entry"],
)
def test_a_checkpoint_with_something_wrong_is_refused(
    checkpoint, tmp_path, enabled, changes, message
):
    folder = _edited(checkpoint[1], tmp_path / "wrong", **changes)
    with pytest.raises(BiasCompensationError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_missing_shard_names_the_tensor(checkpoint, tmp_path, enabled):
    def only_vectors_of_blocks(state):
        for name in list(state):
            if name.endswith(SUFFIX) and ".mlp" in name:
                del state[name]

    folder = _edited(checkpoint[1], tmp_path / "wrong", tensors=only_vectors_of_blocks)
    with pytest.raises(BiasCompensationError, match="6 of 16"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_the_flag_on_a_quantized_checkpoint_is_refused(checkpoint, enabled):
    _, out, _ = checkpoint
    with pytest.raises(BiasCompensationError, match="quantized already"):
        AutoModelForCausalLM.from_pretrained(out, quantization_config=_config())


def test_calibration_data_that_is_all_padding_is_refused(checkpoint, tmp_path, enabled):
    dataset = [{**s, "attention_mask": torch.zeros_like(s["attention_mask"])} for s in sequences()]
    with pytest.raises(BiasCompensationError, match="all padding"):
        _quantize(checkpoint[0], tmp_path, dataset=dataset)


def test_a_float_model_that_overflows_is_refused_before_quantizing(tmp_path, enabled):
    source = tiny_checkpoint(tmp_path / "float")
    state = load_file(tmp_path / "float" / "model.safetensors")
    state["model.layers.1.mlp.down_proj.weight"].fill_(torch.inf)
    save_file(state, tmp_path / "float" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BiasCompensationError, match="not finite"):
        _quantize(source, tmp_path)
