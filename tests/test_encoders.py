"""Image models and encoders: the same pass, with whatever inputs they take."""

import pytest
import torch
from models import crudely_quantized
from transformers import (
    BertConfig,
    BertModel,
    DeiTConfig,
    DeiTForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    YolosConfig,
    YolosForObjectDetection,
)

import bc_plugin
from bc_plugin import Compensation

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
IMAGE = {**SIZES, "image_size": 16, "patch_size": 4}
MODELS = {
    "vit": (ViTForImageClassification, ViTConfig, IMAGE),
    "deit": (DeiTForImageClassification, DeiTConfig, IMAGE),
    "yolos": (
        YolosForObjectDetection,
        YolosConfig,
        {**IMAGE, "image_size": [16, 16], "num_detection_tokens": 5},
    ),
    "bert": (BertModel, BertConfig, {**SIZES, "vocab_size": 96}),
}


def inputs(kind, count=8, seed=0):
    torch.manual_seed(seed)
    if kind != "bert":
        return [{"pixel_values": torch.randn(2, 3, 16, 16)} for _ in range(count)]
    batches = []
    for _ in range(count):
        ids = torch.randint(3, 96, (2, 12))
        mask = torch.ones_like(ids)
        mask[1, 9:] = 0
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


def output(model, kind):
    with torch.no_grad():
        return model(**inputs(kind, 1, seed=1)[0])[0]


@pytest.mark.parametrize("positions", [0, 1, "all"])
@pytest.mark.parametrize("kind", MODELS)
def test_errors_fall_and_outputs_survive_saving(tmp_path, kind, positions):
    torch.manual_seed(0)
    model_class, config_class, settings = MODELS[kind]
    model = model_class(config_class(**settings)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:  # some start as zeros
            torch.nn.init.normal_(parameter, std=0.2)
    quantized = crudely_quantized(model)
    plain = output(quantized, kind)
    compensation = bc_plugin.compensate(
        quantized, model, inputs(kind), {"positions": positions, "dtype": "float32"}
    )
    assert len(compensation.vectors) == 2 * 7
    assert all(errors.after < errors.before for errors in compensation.errors.values())
    compensation.attach(quantized)
    expected = output(quantized, kind)
    assert not torch.allclose(expected, plain)
    compensation.save(tmp_path)
    other = crudely_quantized(model)
    Compensation.load(tmp_path).attach(other)
    assert torch.equal(output(other, kind), expected)
    compensation.detach(quantized)
    assert torch.equal(output(quantized, kind), plain)
