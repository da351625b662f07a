"""A small vision transformer, trained once on Fashion-MNIST and kept between runs.

The seed fixes the first weights and the order of the images; another machine's kernels round
differently, so it ends with slightly other weights.
"""

from __future__ import annotations

import os
from collections.abc import Callable

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import ViTConfig, ViTForImageClassification

from rig.folders import CACHE
from rig.quantizers import qat
from rig.subjects import fashion
from rig.subjects.fashion import Images

FOLDER = CACHE / "vit-fashion"
CONFIG = {
    "image_size": fashion.SIDE,
    "patch_size": 4,
    "num_channels": 1,
    "hidden_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "num_labels": fashion.CLASSES,
    "attn_implementation": "eager",
}
KEEP = ["vit.embeddings*", "vit.layernorm", "classifier"]  # float when all else is quantized
BATCH = 128


def trained() -> ViTForImageClassification:
    """The float model, trained on first use."""
    return _kept("float", lambda images: train(_new(), images, epochs=8, peak=1e-3))


def tuned() -> ViTForImageClassification:
    """What quantization-aware training makes of it: the weights, not rounded."""

    def make(images: Images) -> nn.Module:
        model = qat.prepared(trained(), KEEP)
        return qat.float_again(train(model, images, epochs=1, peak=1e-4))

    return _kept("qat", make)


def _new() -> ViTForImageClassification:
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(**CONFIG))


def _kept(name: str, make: Callable[[Images], nn.Module]) -> ViTForImageClassification:
    folder = FOLDER / name
    if not (folder / "model.safetensors").exists():
        images, _ = fashion.split(fashion.read(fashion.archive()))
        make(images).save_pretrained(folder)
    # As it was trained: PyTorch's fused attention is several times slower in bfloat16 on a CPU.
    return ViTForImageClassification.from_pretrained(folder, attn_implementation="eager").eval()


def train(model: nn.Module, images: Images, epochs: int, peak: float, seed: int = 0) -> nn.Module:
    """Train ``model`` itself: AdamW, bfloat16 autocast, one cycle of the learning rate."""
    generator = torch.Generator().manual_seed(seed)
    inputs = images.inputs()
    steps = epochs * (len(inputs) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), peak, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, steps, pct_start=0.1)
    model.train()
    with tqdm(total=steps, desc="Training", mininterval=10) as progress:
        for _ in range(epochs):
            order = torch.randperm(len(inputs), generator=generator)
            for rows in order[: len(order) // BATCH * BATCH].split(BATCH):
                with torch.autocast("cpu", torch.bfloat16):
                    logits = model(varied(inputs[rows], generator)).logits
                    loss = nn.functional.cross_entropy(logits.float(), images.labels[rows])
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                progress.update()
    return model.eval()


def varied(inputs: Tensor, generator: torch.Generator) -> Tensor:
    """Each image (count, 1, 28, 28) shifted by up to two pixels, and half of them mirrored."""
    count = len(inputs)
    shift = torch.randint(0, 5, (2, count), generator=generator)
    mirrored = torch.rand(count, generator=generator) < 0.5
    padded = nn.functional.pad(inputs, (2, 2, 2, 2), value=-1.0)
    shifts = padded.unfold(2, fashion.SIDE, 1).unfold(3, fashion.SIDE, 1)  # (count, 1, 5, 5, ...)
    shifted = shifts[torch.arange(count), :, shift[0], shift[1]]
    return torch.where(mirrored[:, None, None, None], shifted.flip(-1), shifted)
