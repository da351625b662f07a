"""One quantization config, the user's, for several models."""

from types import SimpleNamespace

import pytest
from helpers.language import crudely_quantized, tiny_model, token_batches

import bc_plugin


class _Config(SimpleNamespace):
    def to_dict(self):
        return dict(vars(self))


@pytest.mark.parametrize("kind", [dict, _Config])
def test_each_model_has_its_own_entry(kind):
    shared = kind(bits=4)
    pairs = []
    for seed in (0, 1):
        model = tiny_model(seed=seed)
        quantized = crudely_quantized(model)
        quantized.config.quantization_config = shared
        compensation = bc_plugin.compensate(quantized, model, token_batches())
        compensation.attach(quantized)
        pairs.append((quantized, compensation))
    for quantized, compensation in pairs:
        config = quantized.config.quantization_config
        settings = config if kind is dict else vars(config)
        assert settings == {"bits": 4, "bias_compensation": compensation.entry()}
        compensation.detach(quantized)
        assert quantized.config.quantization_config == shared == kind(bits=4)
