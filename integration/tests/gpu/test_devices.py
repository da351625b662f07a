"""Vectors are where their modules compute, and the pass comes to the same on any device."""

import copy

import pytest
import torch
from helpers.grouped import grouped
from helpers.language import crudely_quantized, tiny_model, token_batches
from rig.subjects.tiny import sequences
from transformers import AutoModelForCausalLM

import bc_plugin
from bc_plugin import Compensation, RefinementConfig
from bc_plugin.models.modules import device_of
from bc_plugin.names import KEY

SETTINGS = {"positions": 1, "held_out": 0.25, "dtype": "float64"}
TRAINED = ("vectors", "scales", "norms")


@pytest.fixture(autouse=True)
def _exact():
    """Products of float32 are not rounded to fewer bits."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def _maps(device):
    """By what is asked for: how ``device_map`` and ``max_memory`` are given."""
    if device.type != "cuda":
        return {"one": {"device_map": "auto"}, "divided": {"device_map": {"": "cpu"}}}
    layers = {f"model.layers.{n}": n for n in range(2)}
    around = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 0, "lm_head": 0}
    other = 1 if torch.cuda.device_count() > 1 else "cpu"  # offloaded, and lent to the first
    divided = around | {name: (0, other)[number] for name, number in layers.items()}
    return {"one": {"device_map": "auto"}, "divided": {"device_map": divided}}


@pytest.mark.parametrize("method", ["gptq", "compressed-tensors"])
@pytest.mark.parametrize("asked", ["one", "divided"])
def test_vectors_are_where_their_modules_compute(asked, method, device, checkpoint, enabled):
    pytest.importorskip("gptqmodel", reason="needs the gptq extra")
    pytest.importorskip("compressed_tensors", reason="needs other quantizers")
    folder, _ = checkpoint(method)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float16, **_maps(device)[asked]
    )
    whole = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float16, device_map={"": device}
    )
    seen = _places_of_vectors(model)
    assert seen and all(place.type == device.type for place in seen.values())
    batch = {key: value.to(device) for key, value in sequences(1)[0].items()}
    with torch.no_grad():
        found, expected = (each(**batch).logits.float().cpu() for each in (model, whole))
    assert (found - expected).norm() < 0.01 * expected.norm()


def _places_of_vectors(model):
    """Where each site's vectors are while it runs, by name."""
    seen = {}
    for name in Compensation.attached_to(model).vectors:
        module = model.get_submodule(name)
        seen[name] = getattr(module, KEY).device
        if seen[name].type in ("meta", "cpu"):  # accelerate lends them with the weights
            seen[name] = device_of(module)
    return seen


def _compensated(where, scales):
    model = tiny_model().double()
    quantized = grouped(model) if scales else crudely_quantized(model)
    model, quantized = model.to(where), quantized.to(where)
    settings = {**SETTINGS, "scales": scales}
    return model, quantized, bc_plugin.compensate(quantized, model, token_batches(8), settings)


@pytest.mark.parametrize("scales", [False, True])
def test_the_pass_comes_to_the_vectors_that_a_cpu_gives(device, scales):
    *_, here = _compensated(device, scales)
    *_, there = _compensated("cpu", scales)
    assert here.vectors.keys() == there.vectors.keys()
    for name, expected in there.vectors.items():
        torch.testing.assert_close(here.vectors[name].cpu(), expected, rtol=1e-6, atol=1e-9)
        assert here.errors[name].after == pytest.approx(there.errors[name].after, rel=1e-6)


@pytest.mark.parametrize("by", ["model", "block"])
def test_refinement_comes_to_the_vectors_that_a_cpu_gives(device, by):
    found = []
    for where in (device, "cpu"):
        model, quantized, compensation = _compensated(where, True)
        compensation.attach(quantized)
        config = RefinementConfig(steps=4, by=by, train=TRAINED, evaluate_every=2)
        refined = bc_plugin.refine(quantized, model, token_batches(8), config)
        found.append((refined, copy.deepcopy(quantized.state_dict())))
    (here, weights), (there, expected) = found
    assert here.refined["after"] == pytest.approx(there.refined["after"], rel=1e-4)
    for name, vectors in there.vectors.items():
        torch.testing.assert_close(here.vectors[name].cpu(), vectors, rtol=1e-4, atol=1e-5)
    for name, value in expected.items():
        if name.endswith((".scales", "norm.weight")):
            torch.testing.assert_close(weights[name].cpu(), value, rtol=1e-4, atol=1e-5)
