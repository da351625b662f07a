"""AutoGPTQ on a real model's first 8 blocks; ``make benchmark-toolkits`` does the whole model."""

import pytest
import torch

pytest.importorskip("auto_gptq", reason="needs the autogptq extra, in its own environment")

from rig.quantizers.pipelines import PIPELINES, model_of
from rig.subjects import real
from transformers import AutoModelForCausalLM, AutoTokenizer

import bc_plugin
from bc_plugin import Compensation

BLOCKS, SAMPLES, LENGTH, EVALUATED = 8, 16, 512, 4


def _float():
    return AutoModelForCausalLM.from_pretrained(real.smollm2(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def shortened(tmp_path_factory):
    """The model without its later blocks."""
    folder = tmp_path_factory.mktemp("short")
    model = _float()
    model.model.layers = model.model.layers[:BLOCKS]
    model.config.num_hidden_layers = BLOCKS
    model.save_pretrained(folder)
    return str(folder)


def _completed(short):
    """The float model with the quantized blocks of ``short`` in front, compensated if they are."""
    compensation = Compensation.attached_to(short)
    if compensation is not None:
        compensation.detach(short)
    model = _float()
    for index, block in enumerate(short.model.layers):
        model.model.layers[index] = block
    if compensation is not None:
        compensation.attach_unchecked(model)  # the digest is that of the shortened model
    return model


def test_the_option_helps_and_survives_saving(shortened, tmp_path, enabled):
    pipeline = PIPELINES["auto_gptq"]
    tokenizer = AutoTokenizer.from_pretrained(real.smollm2())
    calibration = real.calibration_windows(tokenizer, LENGTH, SAMPLES)
    batches = real.held_out_windows(tokenizer, LENGTH, EVALUATED)
    settings = {"bits": 3, "group_size": 64, **pipeline.settings}
    with pipeline.on_cpu():
        plain = model_of(pipeline.quantize(shortened, calibration, None, settings))
        # Not jointly: these blocks alone, on little data, are no better for it.
        result = pipeline.quantize(shortened, calibration, {"joint": False}, settings)
        pipeline.save(result, tmp_path / "out")
        loaded = pipeline.load(tmp_path / "out")
    with torch.no_grad():
        before, after = (model(**batches[0]).logits for model in (model_of(result), loaded))
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)
    # Of the gap that the whole model has, little comes from these blocks, and its share that is
    # closed says nothing about the whole; the divergence from the float model falls here, too.
    found = [
        bc_plugin.evaluate(_completed(short), batches, _float()).kl for short in (plain, loaded)
    ]
    assert found[1] < 0.95 * found[0]
