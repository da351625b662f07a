"""llm-compressor: ``BiasCompensationModifier`` in its recipes."""

import json
from dataclasses import fields

import pytest
import torch

pytest.importorskip("llmcompressor", reason="needs llm-compressor")

from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning import SparseGPTModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform import AWQModifier
from rig.subjects.tiny import logits, sequences, tiny_checkpoint, tiny_tokenizer
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import bc_plugin
from bc_plugin import BiasCompensationConfig, BiasCompensationError, Compensation
from bc_plugin.llmcompressor import BiasCompensationModifier

PIPELINES = ("independent", "sequential", "basic")


def _scheme(bits=4, symmetric=True, group=32):
    weights = {"num_bits": bits, "group_size": group, "symmetric": symmetric, "strategy": "group"}
    return {"group_0": {"targets": ["Linear"], "weights": weights}}


def _gptq(bits=3):
    return [GPTQModifier(config_groups=_scheme(bits), ignore=["lm_head"])]


def _nearest(bits=4, symmetric=True):
    return [QuantizationModifier(config_groups=_scheme(bits, symmetric), ignore=["lm_head"])]


def _w8a8():
    return [QuantizationModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"])]


def _awq():
    return [AWQModifier(n_grid=4), *_nearest(3, symmetric=False)]


RECIPES = {
    "GPTQ": _gptq,
    "nearest": _nearest,
    "nearest, asymmetric": lambda: _nearest(symmetric=False),
    "W8A8": _w8a8,
    "AWQ": _awq,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "float")


def _run(source, recipe, pipeline="independent", data=True, model=None, **settings):
    model = AutoModelForCausalLM.from_pretrained(source) if model is None else model
    rows = [{key: value[0].tolist() for key, value in item.items()} for item in sequences()]
    return oneshot(
        model=model,
        dataset=Dataset.from_list(rows) if data else None,
        tokenizer=tiny_tokenizer(),
        recipe=recipe,
        pipeline=pipeline,
        shuffle_calibration_samples=False,
        **settings,
    )


def _float(source):
    return AutoModelForCausalLM.from_pretrained(source)


def _distance(model, source):
    reference = logits(_float(source))
    return (logits(model) - reference).norm() / reference.norm()


@pytest.mark.parametrize("recipe", ("GPTQ", "nearest, asymmetric", "W8A8"))
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_the_vectors_are_those_computed_by_hand(source, tmp_path, recipe, pipeline):
    make = RECIPES[recipe]
    _run(source, make(), pipeline).save_pretrained(tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    by_hand = bc_plugin.compensate(plain, _float(source), sequences())
    model = _run(source, [*make(), BiasCompensationModifier(joint=False)], pipeline)
    compensation = Compensation.attached_to(model)
    assert compensation.vectors.keys() == by_hand.vectors.keys()
    assert len(compensation.vectors) == 2 * 8
    for name, vectors in by_hand.vectors.items():
        torch.testing.assert_close(compensation.vectors[name], vectors)
    assert compensation.digest == by_hand.digest


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_error_falls_and_what_is_saved_gives_the_same(source, tmp_path, enabled, recipe):
    make = RECIPES[recipe]
    plain = _distance(_run(source, make()), source)
    model = _run(source, [*make(), BiasCompensationModifier()])
    compensation = Compensation.attached_to(model)
    assert all(errors.after <= errors.before for errors in compensation.errors.values())
    assert _distance(model, source) < plain
    model.save_pretrained(tmp_path / "out", save_compressed=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert Compensation.attached_to(loaded).digest == compensation.digest
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)
