"""Export to plain biases, on tiny models whose weights are crudely rounded."""

import json

import pytest
import torch
from helpers.language import crudely_quantized, tiny_model, token_batches
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import bc_plugin
from bc_plugin import BiasCompensationError
from bc_plugin.models.architectures import ARCHITECTURES

WHOLE = {
    "llama": {},
    "granite": {},
    "opt": {},
    "bloom": {},
    "gpt2": {},
    "gpt_neox": {"attention_bias": False},
}
WHOLE |= {"smollm3": {}, "starcoder2": {}, "falcon": {}, "phi": {}}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
PARTIAL_ROPE = ROPE | {"partial_rotary_factor": 0.5}
LONG_ROPE = ROPE | {
    "rope_type": "longrope",
    "original_max_position_embeddings": 64,
    "short_factor": [1.0] * 4,
    "long_factor": [1.0] * 4,
}
PARTIAL = ("qwen2", "qwen3", "gemma", "gemma3_text", "olmo", "cohere", "stablelm")


def _compensated(folder, architecture="llama", positions=0, sites=("linear", "block"), **changes):
    """A checkpoint with its vectors beside it, the model, and its logits."""
    model = tiny_model(architecture, **changes)
    quantized = crudely_quantized(model)
    quantized.save_pretrained(folder)
    settings = {"positions": positions, "sites": sites, "dtype": "float32", "held_out": 0}
    compensation = bc_plugin.compensate(quantized, model, token_batches(), settings)
    compensation.save(folder)
    return compensation, quantized


@torch.no_grad()
def _logits(model):
    return model(**token_batches(1, seed=5)[0]).logits


@pytest.mark.parametrize("architecture", WHOLE)
def test_the_logits_are_the_plugins(tmp_path, architecture):
    compensation, model = _compensated(tmp_path / "in", architecture, **WHOLE[architecture])
    plain = _logits(model)
    compensation.attach(model)
    bc_plugin.export(tmp_path / "in", tmp_path / "out")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(_logits(exported), _logits(model), rtol=1e-4, atol=1e-4)
    assert (_logits(model) - plain).abs().max() > 1e-2
    assert not (tmp_path / "out" / "bias_compensation.safetensors").exists()


@pytest.mark.parametrize("architecture", PARTIAL)
def test_what_cannot_be_carried_is_listed_and_refused(tmp_path, architecture):
    _compensated(tmp_path / "in", architecture)
    with pytest.raises(BiasCompensationError) as caught:
        bc_plugin.export(tmp_path / "in", tmp_path / "out")
    message = str(caught.value)
    assert "model.layers.[0-2].mlp.down_proj: " in message and "% of the error" in message
    if ARCHITECTURES[architecture].last is None:
        assert "no bias stands for the output of a block" in message
    assert list(tmp_path.iterdir()) == [tmp_path / "in"]
    bc_plugin.export(tmp_path / "in", tmp_path / "out", allow_partial=True)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert exported.model.layers[0].self_attn.q_proj.bias.any()


def test_linears_without_a_vector_get_zeros(tmp_path):
    compensation, _ = _compensated(tmp_path / "in", sites=("block",))
    bc_plugin.export(tmp_path / "in", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["mlp_bias"] and not config.get("attention_bias")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    mlp = exported.model.layers[1].mlp
    assert not mlp.gate_proj.bias.any()
    torch.testing.assert_close(mlp.down_proj.bias, compensation.vectors["model.layers.1"][0])


@pytest.mark.parametrize("architecture", ["mistral", "qwen2", "phi3"])
def test_as_llama(tmp_path, architecture):
    compensation, model = _compensated(tmp_path / "in", architecture)
    compensation.attach(model)
    bc_plugin.export(tmp_path / "in", tmp_path / "out", as_llama=True, engine="vllm")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(exported).__name__ == "LlamaForCausalLM"
    torch.testing.assert_close(_logits(exported), _logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("mistral", {"sliding_window": 8}, "sliding window of 8"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8}, "sliding window"),
        ("phi3", {"sliding_window": 8}, "sliding window of 8"),
        ("phi3", {"rope_parameters": PARTIAL_ROPE}, "only 50% of each of its heads"),
        ("phi3", {"rope_parameters": LONG_ROPE}, "of the kind 'longrope'"),
        ("qwen3", {}, r"cannot be rewritten as a Llama; \['mistral', 'phi3', 'qwen2'\] can"),
    ],
)
def test_what_is_not_exactly_a_llama_is_refused(tmp_path, architecture, changes, message):
    _compensated(tmp_path / "in", architecture, **changes)
    with pytest.raises(BiasCompensationError, match=message):
        bc_plugin.export(tmp_path / "in", tmp_path / "out", as_llama=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"engine": "vlm"}, r"engine 'vlm' is unknown; known are \['transformers'"),
        ({"engine": "llama.cpp"}, r"not known here; it can be exported for \['transformers'"),
        ({"engine": "vllm"}, "vllm"),
    ],
)
def test_engines_that_cannot_take_it_are_refused(tmp_path, arguments, message):
    _compensated(tmp_path / "in", "gemma3_text")
    with pytest.raises(BiasCompensationError, match=message):
        bc_plugin.export(tmp_path / "in", tmp_path / "out", **arguments)


def test_several_positions_are_refused_with_the_way_out(tmp_path):
    _compensated(tmp_path / "in", positions=1)
    with pytest.raises(BiasCompensationError, match=r"bc-plugin compensate .* --positions 0"):
        bc_plugin.export(tmp_path / "in", tmp_path / "out")


def test_a_result_that_differs_is_deleted(tmp_path, monkeypatch):
    from bc_plugin.models import architectures

    wrong = architectures.Architecture(
        ARCHITECTURES["llama"].flags, "mlp.down_proj", ARCHITECTURES["llama"].engines, lambda c: 2.0
    )
    monkeypatch.setitem(ARCHITECTURES, "llama", wrong)
    _compensated(tmp_path / "in")
    with pytest.raises(BiasCompensationError, match="has been deleted"):
        bc_plugin.export(tmp_path / "in", tmp_path / "out")
    assert list(tmp_path.iterdir()) == [tmp_path / "in"]


def test_an_unknown_architecture_is_refused(tmp_path):
    _compensated(tmp_path / "in")
    path = tmp_path / "in" / "config.json"
    path.write_text(path.read_text().replace('"llama"', '"llama9"'))
    with pytest.raises(BiasCompensationError, match="model of type 'llama9'"):
        bc_plugin.export(tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize("verify", [True, False])
def test_loading_a_vector_of_other_weights_is_still_refused(tmp_path, verify):
    _compensated(tmp_path / "in")
    _, other = _compensated(tmp_path / "other", seed=3)
    other.save_pretrained(tmp_path / "in")
    with pytest.raises(BiasCompensationError, match="digest"):
        bc_plugin.export(tmp_path / "in", tmp_path / "out", verify=verify)


def test_without_verifying_no_model_is_loaded(tmp_path, monkeypatch):
    compensation, _ = _compensated(tmp_path / "in")
    bc_plugin.export(tmp_path / "in", tmp_path / "verified")
    monkeypatch.delattr(AutoModelForCausalLM, "from_pretrained")
    bc_plugin.export(tmp_path / "in", tmp_path / "out", verify=False)
    for file in (tmp_path / "verified").iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    vectors = {f"{name}.bias_compensation": v for name, v in compensation.vectors.items()}
    unbound = {"bias_compensation": json.dumps(compensation.entry())}
    save_file(vectors, tmp_path / "in" / "bias_compensation.safetensors", metadata=unbound)
    with pytest.raises(BiasCompensationError, match="do not say which files' weights"):
        bc_plugin.export(tmp_path / "in", tmp_path / "again", verify=False)
