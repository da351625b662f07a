"""Vectors trained from the closed form on."""

import copy

import pytest
import torch
from models import crudely_quantized, tiny_model, token_batches
from torch import nn

import bc_plugin
from bc_plugin import BiasCompensationError, Compensation, FloatLogits, RefinementConfig
from bc_plugin.models.blocks import find_blocks
from bc_plugin.models.predictions import next_token_log_probabilities
from bc_plugin.models.tracker import PositionTracker
from bc_plugin.refinement.data import RefinementData
from bc_plugin.refinement.parameters import merged_blocks, trained
from bc_plugin.refinement.train import Training, learning_rate_factor
from bc_plugin.vectors.check import weights_digest

CALIBRATION = token_batches(count=64)
SETTINGS = {
    "steps": 12,
    "learning_rate": 0.02,
    "batch_tokens": 256,
    "held_out": 0.25,
    "evaluate_every": 4,
    "top_k": None,
}


def compensated(architecture="llama", positions=1, model_dtype=torch.float32, **config):
    model = tiny_model(architecture).to(model_dtype)
    quantized = crudely_quantized(model)
    settings = {"positions": positions, "held_out": 0, **config}
    bc_plugin.compensate(quantized, model, CALIBRATION, settings).attach(quantized)
    return model, quantized


def refine(quantized, model, folder=None, **settings):
    config = RefinementConfig(**{**SETTINGS, **settings})
    return bc_plugin.refine(quantized, model, CALIBRATION, config, folder=folder)


def held_out(config=None):
    data = RefinementData(CALIBRATION, config or RefinementConfig(**SETTINGS))
    return [data.batches[number] for number in data.apart]


def logits(model):
    with torch.no_grad():
        return model(**token_batches(1, seed=5)[0]).logits


@pytest.mark.parametrize("by", ["model", "block"])
@pytest.mark.parametrize("positions", [0, 1])
@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt2", "gemma3_text"])
def test_it_gets_better_and_nothing_else_changes(architecture, positions, by):
    model, quantized = compensated(architecture, positions)
    before = Compensation.attached_to(quantized)
    digest = weights_digest(quantized, [find_blocks(quantized).path])
    weights = {name: tensor.clone() for name, tensor in quantized.state_dict().items()}
    kl = bc_plugin.evaluate(quantized, held_out(), model).kl
    after = refine(quantized, model, by=by)
    assert after is Compensation.attached_to(quantized)
    assert after.refined["after"] < after.refined["before"]
    assert bc_plugin.evaluate(quantized, held_out(), model).kl < kl
    assert weights_digest(quantized, [find_blocks(quantized).path]) == digest
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


def test_vectors_in_training_do_what_attached_ones_do():
    _, quantized = compensated("opt", positions=2)
    batch = token_batches(1, length=12, batch=3)[0]
    batch["attention_mask"][0, :4] = 0
    batch["attention_mask"][1, 9:] = 0
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = quantized(**batch).logits[real]
    compensation = Compensation.attached_to(quantized)
    compensation.detach(quantized)
    blocks = find_blocks(quantized)
    tracker = PositionTracker(compensation.positions)
    handles = tracker.listen(
        quantized.get_submodule(blocks.owner), quantized.get_submodule(blocks.names[0])
    )
    modules = {name: quantized.get_submodule(name) for name in compensation.vectors}
    with torch.no_grad(), trained(modules, compensation, tracker):
        found = quantized(**batch).logits[real]
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_largest_values_and_the_rest_as_one(tmp_path):
    model, quantized = compensated()
    batch = token_batches(1, batch=2)[0]
    targets = FloatLogits.record(model, [batch], tmp_path, top_k=5)
    with torch.no_grad():
        log_p = model(**batch).logits[:, :-1].flatten(0, 1).log_softmax(-1).double()
        log_q = quantized(**batch).logits[:, :-1].flatten(0, 1).log_softmax(-1).double()
    index = log_p.topk(5).indices

    def grouped(log):
        p = log.exp()
        top = p.gather(-1, index)
        return torch.cat([top, 1 - top.sum(-1, keepdim=True)], -1)

    p, q = grouped(log_p), grouped(log_q)
    expected = (p * (p / q).log()).sum()
    whole = (log_p.exp() * (log_p - log_q)).sum()
    found = targets.divergence(0, log_q.float()).item()
    assert found == pytest.approx(expected.item(), rel=1e-4)
    assert found < whole.item()


def test_padding_is_not_counted(tmp_path):
    model, quantized = compensated()
    batch = token_batches(1, batch=2)[0]
    batch["attention_mask"][1, 10:] = 0
    targets = FloatLogits.record(model, [batch], tmp_path, top_k=None)
    with torch.no_grad():
        log_q = next_token_log_probabilities(quantized, batch)
    assert len(log_q) == 15 + 9
    expected = bc_plugin.evaluate(quantized, [batch], model).kl
    assert targets.divergence(0, log_q).item() / len(log_q) == pytest.approx(expected, rel=1e-4)


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
def test_a_stopped_run_goes_on_from_where_it_was(tmp_path, monkeypatch, by):
    model, quantized = compensated()
    other = copy.deepcopy(quantized)
    expected = refine(other, model, by=by)
    step, made = Training._step, []

    def counted(self, number):
        made.append(number)
        return step(self, number)

    def stopped(self, number):
        if len(made) == (6 if by == "model" else 18):
            raise KeyboardInterrupt
        return counted(self, number)

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("somebody's own")
    before = Compensation.attached_to(quantized)
    reference = logits(quantized)
    monkeypatch.setattr(Training, "_step", stopped)
    with pytest.raises(KeyboardInterrupt):
        refine(quantized, model, tmp_path / "run", by=by)
    assert Compensation.attached_to(quantized) is before
    assert torch.equal(logits(quantized), reference)
    made.clear()
    monkeypatch.setattr(Training, "_step", counted)
    with pytest.raises(BiasCompensationError, match="another"):
        refine(quantized, model, tmp_path / "run", by=by, learning_rate=0.01)
    found = refine(quantized, model, tmp_path / "run", by=by)
    assert len(made) == (8 if by == "model" else 12 + 8)  # from the last look on
    for name, vectors in expected.vectors.items():
        assert torch.equal(found.vectors[name], vectors)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_recomputed_activations_give_the_same():
    model, quantized = compensated()
    other = copy.deepcopy(quantized)
    expected = refine(quantized, model)
    found = refine(other, model, gradient_checkpointing=True)
    for name, vectors in expected.vectors.items():
        torch.testing.assert_close(found.vectors[name], vectors)


def test_accumulated_gradients_are_those_of_one_large_batch():
    model, quantized = compensated(dtype="float32")
    other = copy.deepcopy(quantized)
    # All 48 sequences are trained on in each step, either way.
    expected = refine(quantized, model, batch_tokens=48 * 16)
    found = refine(other, model, batch_tokens=256, gradient_accumulation_steps=3)
    for name, vectors in expected.vectors.items():
        torch.testing.assert_close(found.vectors[name], vectors, rtol=1e-2, atol=1e-4)


class WithoutBackward(nn.Module):
    """A quantized linear whose kernel autograd cannot follow."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("packed", linear.weight.detach())
        self.register_buffer("bias", linear.bias)

    def forward(self, inputs):
        return nn.functional.linear(inputs.detach(), self.packed, self.bias)


class DecidedWhenFirstRun(WithoutBackward):
    """One whose kernel has a backward pass if its first input wants a gradient, as gptqmodel's."""

    followed = None

    def forward(self, inputs):
        if self.followed is None:
            self.followed = inputs.requires_grad
        if not self.followed:
            return super().forward(inputs)
        return nn.functional.linear(inputs, self.packed, self.bias)


@pytest.mark.parametrize("kernel", [WithoutBackward, DecidedWhenFirstRun])
@pytest.mark.parametrize("by", ["model", "block"])
def test_a_kernel_without_a_backward_pass_trains_as_well(by, kernel):
    model = tiny_model()
    quantized = crudely_quantized(model)
    other = copy.deepcopy(quantized)
    for block in other.model.layers:
        for parent in (block.self_attn, block.mlp):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, kernel(child))
    results = []
    for one in (quantized, other):
        bc_plugin.compensate(one, model, CALIBRATION, {"held_out": 0}).attach(one)
        results.append(refine(one, model, by=by))
    assert results[0].refined["after"] < results[0].refined["before"]
    for name, vectors in results[0].vectors.items():
        torch.testing.assert_close(results[1].vectors[name], vectors, rtol=1e-2, atol=1e-3)


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


def test_a_model_that_accelerate_keeps_elsewhere():
    from accelerate import cpu_offload

    model, quantized = compensated()
    other = copy.deepcopy(quantized)
    compensation = Compensation.attached_to(other)
    compensation.detach(other)
    cpu_offload(other, execution_device=torch.device("cpu"))
    compensation.attach_unchecked(other)
    expected = refine(quantized, model, gradient_checkpointing=True)
    found = refine(other, model, gradient_checkpointing=True)
    for name, vectors in expected.vectors.items():
        torch.testing.assert_close(found.vectors[name], vectors)


def test_a_block_and_its_last_linear_are_one_vector():
    _, quantized = compensated()
    compensation = Compensation.attached_to(quantized)
    assert merged_blocks(quantized, compensation) == {f"model.layers.{i}" for i in range(3)}
    _, quantized = compensated("gemma3_text")  # a norm follows its last linear
    assert not merged_blocks(quantized, Compensation.attached_to(quantized))


def test_steps_are_as_large_as_a_vector_but_no_larger_than_half_of_the_error_it_leaves():
    _, quantized = compensated(dtype="float32")
    compensation = Compensation.attached_to(quantized)
    compensation.detach(quantized)
    large, *others = compensation.vectors
    compensation.vectors[large] *= 1000
    modules = {name: quantized.get_submodule(name) for name in compensation.vectors}
    with trained(modules, compensation, PositionTracker(1)) as sites:
        left = compensation.errors[large].after ** 0.5
        torch.testing.assert_close(sites[large].scale, torch.full((2, 1), left / 2))
        for name in others:
            size = compensation.vectors[name].square().mean(-1, keepdim=True).sqrt()
            left = compensation.errors[name].after ** 0.5
            assert (sites[name].scale <= size).all() and (sites[name].scale <= left / 2).all()
            assert ((sites[name].scale == size) | (size > left / 2)).all()


def test_both_models_need_not_be_there_together(tmp_path):
    model, quantized = compensated()
    other = copy.deepcopy(quantized)
    expected = refine(quantized, model)
    config = RefinementConfig(**SETTINGS)
    bc_plugin.record_float_logits(model, CALIBRATION, config, folder=tmp_path)
    found = refine(other, FloatLogits(tmp_path))
    for name, vectors in expected.vectors.items():
        assert torch.equal(found.vectors[name], vectors)
    with pytest.raises(BiasCompensationError, match="batch 0 of 4 with top_k=7"):
        refine(other, FloatLogits(tmp_path), top_k=7)
    with pytest.raises(BiasCompensationError, match="batch 0"):
        bc_plugin.refine(other, FloatLogits(tmp_path), token_batches(64, seed=9), config)


def test_what_was_refined_is_saved_and_loaded(tmp_path):
    model, quantized = compensated()
    found = refine(quantized, model)
    found.save(tmp_path)
    assert Compensation.load(tmp_path).refined == found.refined


def test_warm_up_and_cosine():
    factors = [learning_rate_factor(step, 20, 0.2) for step in range(20)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[4:] == sorted(factors[4:], reverse=True)
    assert 0 < factors[-1] < 0.05


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
