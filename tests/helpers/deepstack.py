"""A tiny Qwen3-VL, which adds images to hidden states between its blocks, and inputs for it."""

from __future__ import annotations

import torch
from torch import nn
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from .language import VOCABULARY

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
IMAGE, START, END = 90, 92, 93


def filled(model: nn.Module) -> nn.Module:
    """With weights so large that every part matters, in float64."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" not in name and parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    return model.eval().double()


def with_deepstack() -> nn.Module:
    """The model."""
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
    vision = {
        **{"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4},
        **{"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2},
        **{"out_hidden_size": 32, "num_position_embeddings": 16},
        "deepstack_visual_indexes": [0, 1],
    }
    config = Qwen3VLConfig(
        text_config={**TEXT, "rope_parameters": {**rope, "mrope_interleaved": True}},
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=91,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    return filled(Qwen3VLForConditionalGeneration(config))


def with_images(count: int = 3) -> list[dict[str, torch.Tensor]]:
    """Prompts with one image each."""
    batches = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        words = torch.randint(3, 80, (8,), generator=generator).tolist()
        ids = torch.tensor([[5, 6, START, *[IMAGE] * 4, END, *words]])
        batches.append(
            {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "pixel_values": torch.randn(16, 3 * 2 * 4 * 4, generator=generator).double(),
                "image_grid_thw": torch.tensor([[1, 4, 4]]),
                "mm_token_type_ids": (ids == IMAGE).int(),
            }
        )
    return batches
