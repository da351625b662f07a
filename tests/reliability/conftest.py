"""A plain checkpoint with its vectors in a file of their own, and what it comes to."""

import pytest
import torch
from helpers.language import crudely_quantized, tiny_model, token_batches
from helpers.reliability.cases import Subject
from helpers.reliability.counts import pytest_terminal_summary  # noqa: F401, a hook
from helpers.vectors import logits
from transformers import AutoModelForCausalLM

import bc_plugin
from bc_plugin import Compensation


def _plain(path):
    return AutoModelForCausalLM.from_pretrained(path)


def load(path):
    model = _plain(path)
    Compensation.load(path).attach(model)
    return logits(model)


def _float(seed):
    """With norms that are not all ones, so that it matters whose they are."""
    model = tiny_model("qwen2", seed, num_hidden_layers=2)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data *= 1 + 0.1 * torch.randn(parameter.shape)
    return model


def _write(folder, float_model, seed=0):
    """What is compensated is what will be loaded, so that types are as they are then."""
    crudely_quantized(float_model).save_pretrained(folder)
    data = token_batches(seed=seed)
    bc_plugin.compensate(_plain(folder), float_model, data, {"positions": 1}).save(folder)


@pytest.fixture(scope="session")
def apart(tmp_path_factory):
    folder = tmp_path_factory.mktemp("apart")
    others = {name: folder / name for name in ("vectors", "model", "float")}
    model, other = _float(0), _float(1)
    _write(folder / "out", model)
    _write(others["vectors"], model, seed=5)
    _write(others["model"], other)
    model.save_pretrained(others["float"])
    expected = {"compensated": load(folder / "out"), "plain": logits(_plain(folder / "out"))}
    return Subject(folder / "out", load, expected, others)
