"""Convolutions outside of the blocks: one vector per channel, or one per patch."""

import copy

import pytest
import torch
from helpers.images import inputs, tiny
from helpers.language import crudely_quantized

import bc_plugin
from bc_plugin import BiasCompensationError, Compensation

NAME = "vit.embeddings.patch_embeddings.projection"
EXACT = {"dtype": "float64", "held_out": 0}
PATCHES = 16


@pytest.fixture(scope="module")
def pair():
    model = tiny("vit").double()
    return model, crudely_quantized(model)


def images(count=4):
    return [{"pixel_values": batch["pixel_values"].double()} for batch in inputs("vit", count)]


def shifts(model, quantized):
    """(images, patches, channels), quantized minus float."""
    both = []
    for either in (quantized, model):
        module = either.get_submodule(NAME)
        with torch.no_grad():
            both.append(torch.cat([module(batch["pixel_values"]) for batch in images()]))
    return (both[0] - both[1]).flatten(2).transpose(1, 2)


@pytest.mark.parametrize("positions", [0, 1])
def test_the_error_falls_by_exactly_the_squared_mean_of_each_channel(pair, positions):
    compensation = bc_plugin.compensate(*pair[::-1], images(), {"positions": positions, **EXACT})
    shift, errors = shifts(*pair), compensation.errors[NAME]
    mean = shift.mean((0, 1))
    torch.testing.assert_close(compensation.vectors[NAME], -mean[None], rtol=1e-9, atol=1e-12)
    assert compensation.kinds[NAME] == "convolution"
    assert errors.before == pytest.approx(shift.square().mean().item(), rel=1e-9)
    drop = mean.square().mean().item()
    assert errors.before - errors.after == pytest.approx(drop, rel=1e-9)


def test_all_positions_are_all_patches(pair):
    compensation = bc_plugin.compensate(*pair[::-1], images(), {"positions": "all", **EXACT})
    shift, errors = shifts(*pair), compensation.errors[NAME]
    mean = shift.mean(0)
    torch.testing.assert_close(compensation.vectors[NAME], -mean, rtol=1e-9, atol=1e-12)
    assert compensation.vectors["vit.layers.0"].shape == (PATCHES + 2, 32)  # class token, later
    drop = mean.square().mean().item()
    assert errors.before - errors.after == pytest.approx(drop, rel=1e-9)


@pytest.mark.parametrize("positions", [0, 1, "all"])
def test_a_compensated_convolution_has_the_reported_error(pair, positions):
    model, quantized = pair
    compensation = bc_plugin.compensate(
        quantized, model, images(), {"positions": positions, **EXACT}
    )
    before, state = shifts(model, quantized), copy.deepcopy(quantized.state_dict())
    compensation.attach(quantized)
    measured = shifts(model, quantized).square().mean().item()
    assert measured == pytest.approx(compensation.errors[NAME].after, rel=1e-9)
    assert set(quantized.state_dict()) - set(state) == {
        f"{name}.bias_compensation" for name in compensation.vectors
    }
    compensation.detach(quantized)
    assert torch.equal(shifts(model, quantized), before)
    assert list(quantized.state_dict()) == list(state)
    assert "forward" not in vars(quantized.get_submodule(NAME))


def test_a_convolution_that_was_not_quantized_is_no_site(pair):
    model, quantized = pair[0], copy.deepcopy(pair[1])
    quantized.get_submodule(NAME).weight.data.copy_(model.get_submodule(NAME).weight)
    compensation = bc_plugin.compensate(quantized, model, images())
    assert NAME not in compensation.vectors


def test_blocks_alone_leave_convolutions_out(pair):
    compensation = bc_plugin.compensate(*pair[::-1], images(), {"sites": "block"})
    assert set(compensation.vectors) == {"vit.layers.0", "vit.layers.1"}


def test_held_out_images_are_not_fitted_to(pair):
    config = {"positions": 0, "dtype": "float64", "held_out": 0.5}
    compensation = bc_plugin.compensate(*pair[::-1], images(), config)
    shift, errors = shifts(*pair), compensation.errors[NAME]
    fitted, apart = (shift.reshape(4, -1, 32)[i] for i in ([0, 2], [1, 3]))
    mean = fitted.mean((0, 1))
    torch.testing.assert_close(compensation.vectors[NAME][0], -mean, rtol=1e-9, atol=1e-12)
    assert errors.held_out_after == pytest.approx((apart - mean).square().mean().item(), rel=1e-9)


def test_images_of_another_size_are_refused_where_each_patch_has_a_vector(pair):
    model, quantized = pair
    wide = {"pixel_values": torch.randn(1, 3, 16, 32).double(), "interpolate_pos_encoding": True}
    config = {"positions": "all", **EXACT}
    with pytest.raises(BiasCompensationError, match="images of one size"):
        bc_plugin.compensate(quantized, model, [*images(), wide], config)
    compensation = bc_plugin.compensate(quantized, model, images(), config)
    compensation.attach(quantized)
    try:
        with pytest.raises(BiasCompensationError, match=r"32 patches.*vectors for 16"):
            quantized(**wide)
    finally:
        compensation.detach(quantized)
    shared = bc_plugin.compensate(quantized, model, [*images(), wide], {"positions": 1, **EXACT})
    assert shared.vectors[NAME].shape == (1, 32)


def test_convolutions_that_do_not_cut_patches_have_a_vector_per_channel():
    model = tiny("detr")
    config = {"positions": "all", "blocks": "model.encoder.layers"}
    compensation = bc_plugin.compensate(crudely_quantized(model), model, inputs("detr"), config)
    assert compensation.vectors["model.input_projection"].shape == (1, 32)
    assert compensation.vectors["model.encoder.layers.0"].shape == (17, 32)


def test_a_convolution_that_nothing_reaches_is_left_out(pair, capsys):
    model, quantized = (copy.deepcopy(either) for either in pair)
    for either, value in ((model, 0.5), (quantized, 0.25)):
        either.unused = torch.nn.Conv2d(1, 1, 1).double()
        torch.nn.init.constant_(either.unused.weight, value)
    compensation = bc_plugin.compensate(quantized, model, images())
    assert "unused" not in compensation.vectors
    assert "unused: left out" in capsys.readouterr().out


def test_vectors_of_another_convolution_are_refused(pair):
    model, quantized = pair[0], copy.deepcopy(pair[1])
    compensation = bc_plugin.compensate(quantized, model, images())
    quantized.get_submodule(NAME).weight.data.mul_(1.5)
    with pytest.raises(BiasCompensationError, match="digest"):
        compensation.attach(quantized)


def test_damaged_vectors_of_a_convolution_are_refused(pair):
    model, quantized = pair
    compensation = bc_plugin.compensate(quantized, model, images())
    compensation.vectors[NAME] = compensation.vectors[NAME][:, :-1]
    with pytest.raises(BiasCompensationError, match="expected"):
        compensation.attach(quantized)


def test_refinement_is_refused(pair):
    model, quantized = pair
    compensation = bc_plugin.compensate(quantized, model, images())
    compensation.attach(quantized)
    try:
        with pytest.raises(BiasCompensationError, match="vectors of convolutions"):
            bc_plugin.refine(quantized, model, images())
    finally:
        Compensation.attached_to(quantized).detach(quantized)


def test_inspect_shows_convolutions(pair, tmp_path):
    from typer.testing import CliRunner

    from bc_plugin.cli import app

    bc_plugin.compensate(*pair[::-1], images(), {"positions": 0}).save(tmp_path)
    result = CliRunner().invoke(app, ["inspect", str(tmp_path)], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert NAME in result.output and "convolution" in result.output
