"""Tiny random image models and an encoder, and what they are called with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    DeiTConfig,
    DeiTForImageClassification,
    DetrConfig,
    DetrForObjectDetection,
    ResNetConfig,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    YolosConfig,
    YolosForObjectDetection,
)

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
IMAGE = {**SIZES, "image_size": 16, "patch_size": 4}
RESNET = {
    "embedding_size": 8,
    "hidden_sizes": [8, 16],
    "depths": [1, 1],
    "layer_type": "basic",
    "out_features": ["stage1"],
}
SWIN = {
    "image_size": 16,
    "patch_size": 2,
    "window_size": 4,  # four windows in the first stage, one in the second
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
}
DETR = {
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "num_queries": 5,
}
MODELS = {
    "vit": (ViTForImageClassification, ViTConfig, IMAGE),
    "deit": (DeiTForImageClassification, DeiTConfig, IMAGE),
    "yolos": (
        YolosForObjectDetection,
        YolosConfig,
        {**IMAGE, "image_size": [16, 16], "num_detection_tokens": 5},
    ),
    "bert": (BertModel, BertConfig, {**SIZES, "vocab_size": 96}),
    "swin": (SwinForImageClassification, SwinConfig, SWIN),
    "detr": (DetrForObjectDetection, DetrConfig, DETR),
}


def tiny(kind: str) -> nn.Module:
    """A random float32 model of a few thousand weights."""
    torch.manual_seed(0)
    model_class, config_class, settings = MODELS[kind]
    if kind == "detr":
        settings = {**settings, "backbone_config": ResNetConfig(**RESNET)}
    model = model_class(config_class(**settings)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:  # some start as zeros
            nn.init.normal_(parameter, std=0.2)
    return model


def inputs(kind: str, count: int = 8, seed: int = 0) -> list[dict[str, Tensor]]:
    """Batches of two."""
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


@torch.no_grad()
def output(model: nn.Module, kind: str) -> Any:
    """The first thing a model gives for a batch of its own."""
    return model(**inputs(kind, 1, seed=1)[0])[0]


def mean_shifts(
    model: nn.Module,
    quantized: nn.Module,
    names: Iterable[str],
    batches: Iterable[dict[str, Tensor]],
    real: Callable[[int], slice] = slice,
) -> dict[str, Tensor]:
    """Float minus quantized linear, on average over an ordinary run of the float model.

    Args:
        real: Of so many tokens, which are no padding.
    """
    shifts = {name: [] for name in names}

    def watch(name: str) -> None:
        other = quantized.get_submodule(name)

        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            shift = (output - other(args[0])).flatten(0, -2)
            shifts[name].append(shift[real(len(shift))])

        model.get_submodule(name).register_forward_hook(hook)

    for name in shifts:
        watch(name)
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    return {name: torch.cat(values).mean(0) for name, values in shifts.items()}
