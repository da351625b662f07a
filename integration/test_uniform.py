"""The reference quantizer: quantized activations, compensated."""

from functools import partial

import pytest
import torch
import uniform
from helpers import images
from helpers.images import inputs, tiny

import bc_plugin
from bc_plugin import Compensation

KEEP = ["vit.embeddings*", "classifier"]

output = partial(images.output, kind="vit")


def test_values_lie_on_the_grid():
    linear = torch.nn.Linear(8, 3)
    low, high = torch.tensor(-1.0), torch.tensor(2.0)
    quantized = uniform.UniformLinear(linear, (4, 2), low, high)
    assert quantized.input_values(torch.tensor([-9.0, -0.6, 0.1, 0.6, 9.0])).tolist() == [
        -1.0,
        -1.0,
        0.0,
        1.0,
        2.0,
    ]
    values = quantized.weight
    assert all(len(row.unique()) <= 16 for row in values)
    assert ((values - linear.weight).abs() <= quantized.scale).all()
    inputs = torch.randn(5, 8)
    expected = quantized.input_values(inputs) @ values.T + linear.bias
    torch.testing.assert_close(quantized(inputs), expected)


def test_a_symmetric_grid_is_one_for_the_whole_tensor():
    linear = torch.nn.Linear(8, 3)
    ranges = torch.tensor(-1.0), torch.tensor(2.0)
    quantized = uniform.UniformLinear(linear, (4, 3), *ranges, uniform.symmetric)
    assert len(quantized.scale.unique()) == 1 and len(quantized.weight.unique()) <= 16
    # Eight levels, of which one is 0: three above, and four below that are hardly used.
    values = quantized.input_values(torch.linspace(-9, 9, 999)).unique()
    torch.testing.assert_close(values, torch.arange(-4.0, 4.0) * 2 / 3.5)


@pytest.mark.parametrize("positions", [0, 1, "all"])
@pytest.mark.parametrize("bits", [(8, 8), (4, 4)])
def test_a_compensated_model_is_closer_and_survives_saving(tmp_path, bits, positions):
    model = tiny("vit")
    quantized = uniform.quantize(model, bits, inputs("vit"), KEEP)
    plain = output(quantized)
    compensation = bc_plugin.compensate(
        quantized, model, inputs("vit"), {"positions": positions, "dtype": "float32"}
    )
    assert len(compensation.vectors) == 2 * 7
    assert all(errors.after < errors.before for errors in compensation.errors.values())
    compensation.attach(quantized)
    expected = output(quantized)
    assert not torch.equal(expected, plain)
    compensation.save(tmp_path)
    torch.save(quantized.state_dict(), tmp_path / "model.pt")
    other = uniform.quantize(model, bits, inputs("vit", seed=5), KEEP)  # other ranges
    other.load_state_dict(torch.load(tmp_path / "model.pt"), strict=False)
    Compensation.load(tmp_path).attach(other)
    assert torch.equal(output(other), expected)
    compensation.detach(quantized)
    assert torch.equal(output(quantized), plain)


def test_fewer_bits_of_activations_shift_outputs_more():
    model = tiny("vit")
    errors = [
        (output(uniform.quantize(model, (8, bits), inputs("vit"), KEEP)) - output(model)).norm()
        for bits in (8, 6, 4)
    ]
    assert errors[0] < errors[1] < errors[2]


def test_patch_embeddings_are_quantized_unless_kept():
    model = tiny("vit")
    quantized = uniform.quantize(model, (4, 8), inputs("vit"), ["classifier"])
    patches = quantized.vit.embeddings.patch_embeddings.projection
    assert isinstance(patches, uniform.UniformConv2d)
    pixels = inputs("vit", 1)[0]["pixel_values"]
    original = model.vit.embeddings.patch_embeddings.projection
    expected = torch.nn.functional.conv2d(
        patches.input_values(pixels), patches.weight, original.bias, stride=4
    )
    assert torch.equal(patches(pixels), expected)
    assert 0 < (expected - original(pixels)).abs().max() < 1
    assert not torch.equal(
        output(quantized), output(uniform.quantize(model, (4, 8), inputs("vit"), KEEP))
    )
