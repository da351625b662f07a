"""Loaders that do not know of vectors: joint weights stop them, others load without."""

from dataclasses import replace

import pytest
from helpers.reliability.cases import DAMAGED, HARMLESS, Case, chosen
from helpers.reliability.counts import hold

pytest.importorskip("gptqmodel", reason="needs the gptq extra")

from gptqmodel import GPTQModel
from rig.subjects.tiny import logits, sequences, tiny_tokenizer
from transformers import AutoModel, AutoModelForCausalLM, GPTQConfig, pipeline

import bc_plugin


@pytest.fixture(scope="module")
def joint(checkpoint, tmp_path_factory):
    """A jointly quantized checkpoint, and what it comes to with its vectors."""
    folder = tmp_path_factory.mktemp("joint")
    source = checkpoint.others["float"]
    bc_plugin.enable()
    try:
        config = GPTQConfig(bits=4, group_size=32, dataset=sequences(), bias_compensation=True)
        model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    finally:
        bc_plugin.disable()
    model.config.quantization_config.dataset = None  # tokens, which JSON cannot hold
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder, logits(model)


def _pipeline(folder):
    return logits(pipeline("text-generation", model=str(folder)).model)


LOADERS = {
    "transformers": lambda folder: logits(AutoModelForCausalLM.from_pretrained(folder)),
    "transformers, on a device map": lambda folder: logits(
        AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")
    ),
    "transformers, without its head": lambda folder: AutoModel.from_pretrained(folder),
    "a pipeline of transformers": _pipeline,
    "GPTQModel": lambda folder: logits(GPTQModel.load(str(folder), device="cpu").model),
}
# Whoever stops, it has to say why.
NAMES = ("bc_plugin|bc-plugin|bias_compensation",)
CASES = [
    *(
        Case("joint without the plugin", who, load, DAMAGED, NAMES, anyone=True)
        for who, load in LOADERS.items()
    ),
    *(
        Case("not joint, without the plugin", who, load, HARMLESS, expected="plain")
        for who, load in LOADERS.items()
        if who.startswith("transformers") and "head" not in who
    ),
    Case("joint with the plugin", "transformers", LOADERS["transformers"], HARMLESS),
    Case("joint with the plugin", "a pipeline of transformers", _pipeline, HARMLESS),
]


@pytest.mark.parametrize("case", chosen(CASES), ids=str)
def test_loaders(case, joint, checkpoint, tmp_path):
    folder, before = joint
    if case.family.startswith("not joint"):
        folder, before = checkpoint.folder, checkpoint.expected["plain"]
    if case.family.endswith("with the plugin"):
        bc_plugin.enable()
    try:
        hold(replace(case, run=lambda room: (case.run(folder), before)), tmp_path)
    finally:
        bc_plugin.disable()
