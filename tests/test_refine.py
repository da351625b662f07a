"""Vectors trained from the closed form on."""

import copy

import pytest
import torch
from helpers.language import tiny_model
from helpers.refinement import CALIBRATION, SETTINGS, compensated, held_out, refine
from torch import nn

import bc_plugin
from bc_plugin import BiasCompensationError, Compensation, FloatLogits, RefinementConfig
from bc_plugin.models.blocks import find_blocks
from bc_plugin.vectors.weights import weights_of


@pytest.mark.parametrize("by", ["model", "block"])
@pytest.mark.parametrize("positions", [0, 1])
@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt2", "gemma3_text"])
def test_it_gets_better_and_nothing_else_changes(architecture, positions, by):
    model, quantized = compensated(architecture, positions)
    before = Compensation.attached_to(quantized)
    digest = weights_of(quantized, [find_blocks(quantized).path])
    weights = {name: tensor.clone() for name, tensor in quantized.state_dict().items()}
    kl = bc_plugin.evaluate(quantized, held_out(), model).kl
    after = refine(quantized, model, by=by, train="vectors")
    assert after is Compensation.attached_to(quantized)
    assert after.refined["after"] < after.refined["before"]
    assert bc_plugin.evaluate(quantized, held_out(), model).kl < kl
    assert weights_of(quantized, [find_blocks(quantized).path]) == digest
    assert {n: (v.shape, v.dtype) for n, v in after.vectors.items()} == {
        n: (v.shape, v.dtype) for n, v in before.vectors.items()
    }
    for name, tensor in quantized.state_dict().items():
        if not name.endswith("bias_compensation"):
            assert torch.equal(tensor, weights[name])
    assert all(p.requires_grad for p in quantized.parameters() if p.is_floating_point())


@pytest.mark.parametrize("by", ["model", "block"])
@pytest.mark.parametrize("positions", [0, 1, "all"])
def test_the_first_look_is_the_kl_that_is_evaluated(positions, by):
    model, quantized = compensated(positions=positions)
    expected = bc_plugin.evaluate(quantized, held_out(), model).kl
    found = refine(quantized, model, steps=1, by=by)
    assert found.refined["before"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("by", ["model", "block"])
@pytest.mark.parametrize("architecture", ["llama", "opt"])  # OPT's blocks return tuples
def test_the_last_look_is_the_kl_that_is_evaluated(architecture, by):
    model, quantized = compensated(architecture, dtype="float32")
    found = refine(quantized, model, by=by)
    expected = bc_plugin.evaluate(quantized, held_out(), model).kl
    assert found.refined["after"] == pytest.approx(expected, rel=1e-4)


def test_better_blocks_that_predict_no_better_are_not_kept():
    model, quantized = compensated()
    for one in (model, quantized):
        nn.init.zeros_(one.lm_head.weight)  # every prediction is the same, right or wrong
    before = Compensation.attached_to(quantized)
    found = refine(quantized, model, by="block")
    assert found.refined["after"] == found.refined["before"] == 0
    for name, vectors in before.vectors.items():
        assert torch.equal(found.vectors[name], vectors)


@pytest.mark.parametrize("by", ["model", "block"])
def test_a_learning_rate_far_too_large_does_no_harm(by):
    model, quantized = compensated()
    before = Compensation.attached_to(quantized)
    after = refine(quantized, model, by=by, learning_rate=1e4, patience=1)
    assert after.refined["after"] == after.refined["before"]
    for name, vectors in before.vectors.items():
        torch.testing.assert_close(after.vectors[name], vectors)
    if by == "model":
        assert after.refined["steps"] == SETTINGS["evaluate_every"]  # patience is at its end


@pytest.mark.parametrize("by", ["model", "block"])
@pytest.mark.parametrize("architecture", ["llama", "opt"])  # a block's vector is fixed, or not
def test_vectors_that_do_harm_are_given_up(architecture, by):
    model, quantized = compensated(architecture, dtype="float32")
    wrong = Compensation.attached_to(quantized)
    wrong.detach(quantized)
    without = bc_plugin.evaluate(quantized, held_out(), model).kl
    vectors = {name: -3 * vector for name, vector in wrong.vectors.items()}
    wrong.replaced(vectors=vectors).attach(quantized)
    found = refine(quantized, model, by=by, train="vectors", steps=1, learning_rate=1e-9)
    assert found.refined["before"] > 1.1 * without
    assert found.refined["after"] == pytest.approx(without, rel=1e-4)
    assert bc_plugin.evaluate(quantized, held_out(), model).kl == pytest.approx(without, rel=1e-4)


@pytest.mark.parametrize("by", ["model", "block"])
def test_half_precision(by):
    model, quantized = compensated(model_dtype=torch.bfloat16)
    found = refine(quantized, model, by=by)
    assert found.refined["after"] < found.refined["before"]
    assert {v.dtype for v in found.vectors.values()} == {torch.bfloat16}


def test_mixed_precision_is_looked_at_exactly():
    model, quantized = compensated()
    expected = bc_plugin.evaluate(quantized, held_out(), model).kl
    found = refine(quantized, model, mixed_precision="bf16")
    assert found.refined["before"] == pytest.approx(expected, rel=1e-4)
    assert found.refined["after"] < expected


def test_a_model_that_accelerate_keeps_elsewhere(capsys):
    from accelerate import cpu_offload

    model, quantized = compensated()
    other, alike = copy.deepcopy(quantized), copy.deepcopy(quantized)
    compensation = Compensation.attached_to(other)
    compensation.detach(other)
    cpu_offload(other, execution_device=torch.device("cpu"))
    compensation.attach_unchecked(other)
    expected = refine(quantized, model, gradient_checkpointing=True)
    found = refine(other, model, gradient_checkpointing=True)
    assert expected.refined["train"] == ["vectors", "norms"]
    assert found.refined["train"] == ["vectors"]
    assert "norms stay as they are" in capsys.readouterr().out
    with pytest.raises(BiasCompensationError, match=r"norm .* is offloaded"):
        refine(other, model, train="norms")
    expected = refine(alike, model, gradient_checkpointing=True, train="vectors")
    for name, vectors in expected.vectors.items():
        torch.testing.assert_close(found.vectors[name], vectors)


def test_what_was_refined_is_saved_and_loaded(tmp_path):
    model, quantized = compensated()
    found = refine(quantized, model)
    found.save(tmp_path)
    assert Compensation.load(tmp_path).refined == found.refined


@pytest.mark.parametrize("by", ["model", "block"])
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 5}, "another model .* agree by"),
        ({"vocab_size": 128}, "another model .* agree by"),
        ({"num_hidden_layers": 2}, "different numbers of blocks"),
        ({"rms_norm_eps": 1e-3}, "rms_norm_eps"),
    ],
)
def test_another_float_model_is_refused(tmp_path, by, changes, said):
    _, quantized = compensated()
    before = Compensation.attached_to(quantized)
    other = tiny_model(**changes)
    with pytest.raises(BiasCompensationError, match=said):
        refine(quantized, other, tmp_path / "run", by=by)
    if by == "model" and "agree" in said:
        config = RefinementConfig(**SETTINGS)
        predictions = bc_plugin.record_float_logits(other, CALIBRATION, config, folder=tmp_path)
        with pytest.raises(BiasCompensationError, match=f"{tmp_path} was recorded from {said}"):
            refine(quantized, predictions)
    assert Compensation.attached_to(quantized) is before
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_refined(tmp_path):
    model, quantized = compensated()
    with pytest.raises(BiasCompensationError, match="not compensated"):
        refine(model, model)
    with pytest.raises(BiasCompensationError, match="two calibration sequences"):
        bc_plugin.refine(quantized, model, CALIBRATION[:1])
    with pytest.raises(BiasCompensationError, match="no input_ids"):
        bc_plugin.refine(quantized, model, [{"pixel_values": torch.zeros(1, 3, 8, 8)}] * 2)
    with pytest.raises(BiasCompensationError, match="compares blocks"):
        refine(quantized, FloatLogits(tmp_path), by="block")
    with pytest.raises(BiasCompensationError, match="takes no float16"):
        refine(compensated()[1].half(), model, mixed_precision="bf16")
    with pytest.raises(BiasCompensationError, match="has compensation vectors attached"):
        refine(quantized, quantized)
    with pytest.raises(BiasCompensationError, match="has compensation vectors attached"):
        bc_plugin.record_float_logits(quantized, CALIBRATION, folder=tmp_path)
    assert Compensation.attached_to(quantized) is not None
    for wrong in (
        {"steps": 0},
        {"top_k": 0.5},
        {"by": "layer"},
        {"held_out": 0},
        {"mixed_precision": "fp8"},
    ):
        with pytest.raises(BiasCompensationError, match=next(iter(wrong))):
            RefinementConfig(**wrong)
