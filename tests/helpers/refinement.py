"""A compensated model, refined as several tests want it."""

from __future__ import annotations

import torch

import bc_plugin
from bc_plugin import RefinementConfig
from bc_plugin.refinement.data import RefinementData

from .language import crudely_quantized, tiny_model, token_batches

CALIBRATION = token_batches(count=64)
SETTINGS = {
    "steps": 12,
    "learning_rate": 0.02,
    "batch_tokens": 256,
    "held_out": 0.25,
    "evaluate_every": 4,
    "top_k": None,
}


def compensated(architecture="llama", positions=1, model_dtype=torch.float32, **config):
    """The float model, and the quantized one with its vectors attached."""
    model = tiny_model(architecture).to(model_dtype)
    quantized = crudely_quantized(model)
    settings = {"positions": positions, "held_out": 0, **config}
    bc_plugin.compensate(quantized, model, CALIBRATION, settings).attach(quantized)
    return model, quantized


def refine(quantized, model, folder=None, **settings):
    """Vectors trained on ``CALIBRATION``, in place of those attached."""
    config = RefinementConfig(**{**SETTINGS, **settings})
    return bc_plugin.refine(quantized, model, CALIBRATION, config, folder=folder)


def held_out(config=None):
    """The batches of ``CALIBRATION`` that are only looked at."""
    data = RefinementData(CALIBRATION, config or RefinementConfig(**SETTINGS))
    return [data.batches[number] for number in data.apart]
