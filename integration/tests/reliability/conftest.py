"""Compensated GPTQ checkpoints of one shape, and what they come to."""

import shutil
from dataclasses import replace

import pytest
import torch
from helpers.reliability.cases import Subject
from helpers.reliability.counts import pytest_terminal_summary  # noqa: F401, a hook
from rig.subjects.tiny import logits, sequences, tiny_checkpoint, tiny_tokenizer
from safetensors.torch import load_file, save_file

import bc_plugin
from bc_plugin import Compensation


def load(path):
    from transformers import AutoModelForCausalLM

    return logits(AutoModelForCausalLM.from_pretrained(path))


def _with_gptqmodel(path):
    from gptqmodel import GPTQModel

    return GPTQModel.load(str(path), device="cpu").model


def load_with_gptqmodel(path):
    return logits(_with_gptqmodel(path))


def load_by_hand(path):
    from transformers import AutoModelForCausalLM

    vectors = Compensation.load(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    vectors.attach(model)
    return logits(model)


def _float(folder, seed=0):
    """With norms that are not all ones, so that it matters whose they are."""
    tiny_checkpoint(folder, "qwen2", seed=seed)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if "norm" in name:
            tensor *= 1 + 0.1 * torch.randn(tensor.shape)
    save_file(tensors, path, metadata={"format": "pt"})


def _quantize(source, folder, seed=0, **flag):
    from transformers import AutoModelForCausalLM, GPTQConfig

    flag = {"positions": 1, "joint": False, **flag}
    data = sequences(seed=seed)
    config = GPTQConfig(bits=4, group_size=32, dataset=data, sym=False, bias_compensation=flag)
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    model.config.quantization_config.dataset = None  # tokens, which JSON cannot hold
    _save(model, folder)


def _save(model, folder):
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def _with_other_vectors(source, float_folder, folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source)
    Compensation.attached_to(model).detach(model)
    reference = AutoModelForCausalLM.from_pretrained(float_folder)
    bc_plugin.compensate(model, reference, sequences(seed=5), {"positions": 1}).attach(model)
    _save(model, folder)


def _without_vectors(source):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source)
    Compensation.attached_to(model).detach(model)
    return logits(model)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """One that transformers loads."""
    pytest.importorskip("gptqmodel", reason="needs the gptq extra")
    folder = tmp_path_factory.mktemp("whole")
    others = {name: folder / name for name in ("vectors", "weights", "model", "float")}
    _float(others["float"])
    _float(folder / "other", seed=1)
    out = folder / "out"
    bc_plugin.enable()
    try:
        _quantize(others["float"], out)
        _quantize(others["float"], others["weights"], seed=3)
        _quantize(folder / "other", others["model"])
        _with_other_vectors(out, others["float"], others["vectors"])
        expected = {"compensated": load(out), "plain": _without_vectors(out)}
    finally:
        bc_plugin.disable()
    yield Subject(out, load, expected, others)
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def checkpoint_of_gptqmodel(checkpoint):
    """The same, loaded by GPTQModel."""
    bc_plugin.enable()
    try:
        model = _with_gptqmodel(checkpoint.folder)
        Compensation.attached_to(model).detach(model)
        expected = {"compensated": load_with_gptqmodel(checkpoint.folder), "plain": logits(model)}
    finally:
        bc_plugin.disable()
    return replace(checkpoint, load=load_with_gptqmodel, expected=expected)


@pytest.fixture(scope="session")
def checkpoint_by_hand(checkpoint):
    """The same, loaded without the plugin, with vectors attached afterwards."""
    return replace(checkpoint, load=load_by_hand)
