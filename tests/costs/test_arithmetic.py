"""Every term against numbers worked out by hand, for a Llama of three blocks."""

import pytest
from helpers.language import tiny_model

from bc_plugin import BiasCompensationConfig, RefinementConfig
from bc_plugin.costs import passing, refining, stored, work
from bc_plugin.costs.shapes import Block, Linear, shapes_of

# q and o of 32 x 32, k and v of 32 x 16, gate and up of 32 x 48, down of 48 x 32.
WEIGHTS = 2 * 1024 + 2 * 512 + 3 * 1536
OUTPUTS = 32 + 16 + 16 + 32 + 48 + 48 + 32
NORMS = 64
EMBEDDINGS = 96 * 32


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    tiny_model().config.save_pretrained(folder)
    return shapes_of(folder)


def test_shapes(shapes):
    assert len(shapes.blocks) == 3
    block = shapes.blocks[0]
    assert sum(linear.values for linear in block.linears) == WEIGHTS
    assert block.others == NORMS
    assert [linear.closes for linear in block.linears] == [False] * 3 + [True] + [False] * 2 + [
        True
    ]
    assert shapes.around == 2 * EMBEDDINGS + 32
    assert shapes.norms == 3 * NORMS + 32
    assert (shapes.hidden, shapes.attention, shapes.vocabulary) == (32, 32, 96)


def test_stored(shapes):
    block = shapes.blocks[0]
    assert stored.float_block(block, 4) == 4 * (WEIGHTS + NORMS)
    # In groups of 16: half a byte for each integer and each zero point, two bytes for a scale,
    # four for the group of an input.
    square, narrow = 34 * 32 // 2 + 2 * 2 * 32 + 4 * 32, 34 * 16 // 2 + 2 * 2 * 16 + 4 * 32
    wide, back = 34 * 48 // 2 + 2 * 2 * 48 + 4 * 32, 51 * 32 // 2 + 3 * 2 * 32 + 4 * 48
    packed = 2 * square + 2 * narrow + 2 * wide + back
    assert stored.packed_block(block, 4, 16, 4) == packed + 4 * NORMS
    assert stored.packed_model(shapes, 4, 16, 2) == 3 * (packed + 2 * NORMS) + 2 * shapes.around
    assert stored.float_model(shapes, 2) == 2 * (3 * (WEIGHTS + NORMS) + shapes.around)
    whole = Linear(32, 16, False)
    assert stored.packed_linear(whole, 3, -1) == 33 * 16 * 3 // 8 + 2 * 16 + 4 * 32
    assert stored.scale_values(shapes, 16) == 3 * (2 * (OUTPUTS - 32) + 3 * 32)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 2 * 3 * (OUTPUTS + 32)),
        ({"positions": 0, "sites": "linear"}, 3 * OUTPUTS),
        ({"positions": "all", "sites": "block"}, 17 * 3 * 32),
    ],
)
def test_vectors(shapes, settings, expected):
    assert stored.vector_values(shapes, BiasCompensationConfig(**settings), 16) == expected


def test_memory_of_the_pass(shapes):
    settings = BiasCompensationConfig(batch_tokens=40, scales=True)
    found = passing.pass_memory(shapes, settings, 4, 16, 4, sequences=6, length=16)
    assert found["activations"] == 2 * 6 * 16 * 32 * 4
    assert found["unpacked weight"] == 48 * 32 * 4
    # Two sequences to a batch: 48 values four times (gate, both outputs, shift), and 32 thrice.
    assert found["intermediates"] == 2 * 16 * 4 * (4 * 48 + 3 * 32)
    # q, k and v share an input, o has its own, gate and up share q's shape, down has its own.
    squares = (32**2, 32**2, 48**2)
    assert found["covariances"] == 2 * 8 * sum(squares) + 3 * 8 * 48**2 + WEIGHTS
    assert passing.intermediates(shapes.blocks[0], 32, 1, 2) == 48 * (3 * 2 + 8) + 3 * 32 * 2


@pytest.mark.parametrize(
    ("samples", "length", "most", "expected"),
    [(128, 512, 8192, 16), (128, 500, 8192, 17), (4, 512, 8192, 4), (9, 9000, 8192, 2)],
)
def test_sequences_of_the_pass(samples, length, most, expected):
    assert passing.sequences_used(samples, length, most) == expected
    assert passing.sequences_used(samples, length, None) == samples


def test_memory_of_refinement(shapes):
    settings = RefinementConfig(train=("vectors", "scales", "norms"))
    vectors, scales = 2 * 3 * (OUTPUTS + 32), stored.scale_values(shapes, 16)
    values = refining.trained_values(shapes, BiasCompensationConfig(), settings.train, 16, 16)
    assert values == vectors + scales + 3 * NORMS + 32
    found = refining.refinement_memory(shapes, settings, 4, 16, 4, tokens=32, values=values)
    kept = 4 * (OUTPUTS + 32 + 48)
    assert found["activations"] == 32 * 3 * (kept + 4 * 2 * 32)
    assert refining.kept_activations(shapes, 32, 4, False) == 32 * 3 * kept
    assert found["gradients"] == 3 * 32 * 48 * 4
    assert refining.kept_activations(shapes, 32, 4, True) == 32 * (3 * 32 * 4 + kept)
    assert found["unpacked weight"] == 48 * (48 + 2 * 32) * 4
    assert found["logits"] == 2 * 32 * 96 * 4
    assert found["optimizer"] == 7 * 4 * values
    assert found["integers"] == 3 * WEIGHTS
    assert refining.recorded_predictions(shapes, 6, 16, 512) == 6 * 15 * 96 * 8
    assert refining.recorded_predictions(shapes, 6, 16, 10) == 6 * 15 * 10 * 8


def test_work(shapes):
    once = 3 * (2 * 96 * WEIGHTS + 4 * 96 * 16 * 32)
    linears = 3 * 2 * 96 * WEIGHTS
    assert work.pass_work(shapes, BiasCompensationConfig(), 96, 16)[1] == 2 * once + linears
    passes, scaled = work.pass_work(shapes, BiasCompensationConfig(scales=True), 96, 16)
    squares = 3 * 2 * 96 * (2 * 32**2 + 48**2)
    assert scaled == 3 * once + linears + squares and sum(passes.values()) == 4
    chosen = work.pass_work(shapes, BiasCompensationConfig(integers=True), 96, 16)[1]
    turn = 7 * 3 * (32**2 * (OUTPUTS - 32) + 48**2 * 32)  # down_proj has 48 inputs, others 32
    assert chosen == scaled + 4 * turn
    settings = RefinementConfig(steps=16, train="vectors", gradient_checkpointing=True)
    passes, found = work.refinement_work(shapes, settings, held_out=32, batch=96, length=16)
    head = 2 * 96 * 32 * 96
    # Three runs of each of 16 batches; a third of a batch before, and after 8 and 16 steps.
    assert found == 16 * 3 * (once + head) + 3 * (once + head) / 3
    assert passes == {"forward and backward": 48, "held-out sequences": 1}


def test_experts_count_for_what_comes_to_them():
    router, stack = Linear(32, 8, True), Linear(32, 48, False, count=8, share=0.25, is_site=False)
    block = Block((router, stack), 0)
    assert stored.float_block(block, 2) == 2 * (32 * 8 + 8 * 32 * 48)
    assert work.linears_forward(block, 10) == 2 * 10 * (32 * 8 + 2 * 32 * 48)
    assert stored.packed_linear(stack, 4, 16) == 8 * (34 * 48 // 2 + 2 * 2 * 48 + 4 * 32)
