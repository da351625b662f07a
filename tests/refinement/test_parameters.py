"""Vectors as parameters: what they do, and how far a step takes them."""

import torch
from helpers.language import token_batches
from helpers.refinement import compensated

from bc_plugin import Compensation
from bc_plugin.models.blocks import find_blocks
from bc_plugin.models.tracker import PositionTracker, Tracking
from bc_plugin.refinement.parameters import merged_blocks, trained


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
    tracking = Tracking(quantized.get_submodule(blocks.owner), blocks.modules(quantized), tracker)
    modules = {name: quantized.get_submodule(name) for name in compensation.vectors}
    with torch.no_grad(), trained(modules, compensation, tracker):
        found = quantized(**batch).logits[real]
    tracking.undo()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


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
