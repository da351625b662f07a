"""Image models and encoders: the same pass, with whatever inputs they take."""

import pytest
import torch
from helpers.images import MODELS, inputs, mean_shifts, output, tiny
from helpers.language import crudely_quantized
from torch import nn

import bc_plugin
from bc_plugin import Compensation

SITES = {
    "vit": 2 * 7 + 1,  # per block six linears and the block; the patch embedding
    "deit": 2 * 7 + 1,
    "yolos": 2 * 7 + 1,
    "bert": 2 * 7,
    "swin": 4 * 7 + 2,  # and the linear that merges patches
    "detr": 2 * 7 + 2 * 11 + 7,  # the decoder has a second attention, the backbone convolutions
}
CASES = [
    (kind, positions)
    for kind in MODELS
    for positions in ([0] if kind in ("swin", "detr") else [0, 1, "all"])
]


@pytest.mark.parametrize(("kind", "positions"), CASES)
def test_errors_fall_and_outputs_survive_saving(tmp_path, kind, positions):
    model = tiny(kind)
    quantized = crudely_quantized(model)
    plain = output(quantized, kind)
    compensation = bc_plugin.compensate(
        quantized, model, inputs(kind), {"positions": positions, "dtype": "float32"}
    )
    assert len(compensation.vectors) == SITES[kind]
    for name, errors in compensation.errors.items():
        # DETR's queries start as zeros, which any weight maps alike.
        nothing = name in [f"model.decoder.layers.0.self_attn.{x}_proj" for x in "vo"]
        assert errors.after < errors.before or (nothing and errors.before == 0)
    compensation.attach(quantized)
    expected = output(quantized, kind)
    assert not torch.allclose(expected, plain)
    compensation.save(tmp_path)
    other = crudely_quantized(model)
    Compensation.load(tmp_path).attach(other)
    assert torch.equal(output(other, kind), expected)
    compensation.detach(quantized)
    assert torch.equal(output(quantized, kind), plain)


@pytest.mark.parametrize("kind", ["vit", "bert"])
def test_a_linear_may_quantize_its_input_too(kind):
    class Quantized(nn.Linear):
        def forward(self, inputs):
            return super().forward((inputs / 0.1).floor() * 0.1)

    model = tiny(kind).double()
    quantized = crudely_quantized(model)
    for module in quantized.modules():
        if type(module) is nn.Linear:
            module.__class__ = Quantized
    batches = [
        {key: v.double() if v.is_floating_point() else v[:1] for key, v in batch.items()}
        for batch in inputs(kind, 3)
    ]
    config = {"positions": 0, "dtype": "float64", "held_out": 0}
    compensation = bc_plugin.compensate(quantized, model, batches, config)
    linears = [n for n, kind in compensation.kinds.items() if kind == "linear"]
    assert len(linears) == 12
    for name, shift in mean_shifts(model, quantized, linears, batches).items():
        vector, errors = compensation.vectors[name][0], compensation.errors[name]
        torch.testing.assert_close(vector, shift, rtol=1e-8, atol=1e-10)
        drop = shift.square().mean().item()
        assert errors.before - errors.after == pytest.approx(drop, rel=1e-7)
