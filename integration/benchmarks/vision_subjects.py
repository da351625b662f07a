"""What the vision benchmark measures: two float models, and what they give when quantized."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from rig.folders import CACHE
from rig.quantizers import qat, uniform, with_quanto
from rig.subjects import fashion, real, trained_vit
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoTokenizer, BertModel

import bc_plugin

FOLDER = CACHE / "vision"
VARIANTS = {"none": None, "BC 1": 1, "BC all": "all"}
GRIDS = {"uniform": uniform.asymmetric, "symmetric": uniform.symmetric}
WIDTHS = {
    "uniform": ["W8A8", "W6A6", "W4A8", "W4A4", "W2A8"],
    "symmetric": ["W8A8", "W6A6", "W4A8", "W4A4"],
    "quanto": ["W8A8", "W4A8"],  # it has no weights of 6 bits, and activations of 8 bits only
}
# Trained with rounding, then compensated to be like the float model it comes from, or like what its
# own weights would do without rounding.
QAT, QAT_OWN = "QAT W4A4", "QAT W4A4, like its own weights"
NEIGHBOURS = 10


class Subject:
    """A float model, what it is calibrated on, and what it gives on its test data.

    Attributes:
        model: The float model.
        keep: Patterns of the names of what is not quantized.
        calibration, tests: Model inputs.
    """

    name: str
    model: nn.Module
    keep: Sequence[str]
    calibration: list[dict[str, Tensor]]
    tests: list[dict[str, Tensor]]

    def output(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """float32 (batch, features)."""
        raise NotImplementedError

    def settings(self) -> list[str]:
        """How the model is quantized: a method, and the bits of weights and of activations."""
        return [f"{method} {bits}" for method, widths in WIDTHS.items() for bits in widths]

    def quantized(self, setting: str) -> nn.Module:
        method, bits = setting.split()
        bits = int(bits[1]), int(bits[3])
        if method in GRIDS:
            grid = GRIDS[method]
            return uniform.quantize(self.model, bits, self.calibration, self.keep, grid)
        folder = FOLDER / self.name / setting
        return with_quanto.quantize(self.model, bits, self.calibration, self.keep, folder)

    def target(self, setting: str) -> nn.Module:
        """The float model that the quantized one is compensated to be like."""
        return self.model

    def run(self) -> None:
        """Whatever is missing."""
        self.measure("float", "none", self.model)
        for setting in self.settings():
            if all(self.path(setting, variant).exists() for variant in VARIANTS):
                continue
            model = self.quantized(setting)
            for variant, positions in VARIANTS.items():
                if not self.path(setting, variant).exists():
                    self.compensated(setting, variant, model, positions)

    def compensated(self, setting: str, variant: str, model: nn.Module, positions) -> None:
        if positions is None:
            self.measure(setting, variant, model)
            return
        config = {"positions": positions, "max_tokens": None}
        target = self.target(setting)
        compensation = bc_plugin.compensate(model, target, self.calibration, config)
        compensation.attach_unchecked(model)  # it is the model they were computed for
        left = [
            errors.held_out_after / errors.held_out_before
            for name, errors in compensation.errors.items()
            if compensation.kinds[name] == "linear"
        ]
        self.measure(setting, variant, model, 1 - torch.tensor(left).median())
        compensation.detach(model)

    def path(self, setting: str, variant: str) -> Path:
        return FOLDER / self.name / f"{setting} {variant}.safetensors"

    @torch.no_grad()
    def measure(
        self, setting: str, variant: str, model: nn.Module, shift: Tensor | None = None
    ) -> None:
        """Run the model on the test data and keep what it gives, and what was found of its error.

        Args:
            shift: Share of a linear's error that its vectors take out, on images or texts held
                out; the median of all linears.
        """
        path = self.path(setting, variant)
        if path.exists():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        batches = tqdm(self.tests, desc=f"{setting} {variant}", mininterval=5)
        outputs = torch.cat([self.output(model, inputs) for inputs in batches])
        partial = path.with_suffix(".partial")
        more = {} if shift is None else {"shift": shift}
        save_file({"outputs": outputs, **more}, partial)
        partial.rename(path)

    def outputs(self, setting: str, variant: str = "none") -> Tensor:
        return load_file(self.path(setting, variant))["outputs"]

    def shift(self, setting: str, variant: str) -> str:
        """That share, or that only blocks were compensated, since there is more than rounding
        between the two models, as after training."""
        share = float(load_file(self.path(setting, variant))["shift"])
        return "blocks only" if math.isnan(share) else f"{share:.0%}"


class Classifier(Subject):
    """A vision transformer on images of Fashion-MNIST, judged by the share it gets right."""

    name = "vit"
    title = "ViT on Fashion-MNIST: % of 5,000 test images right / mean squared error of a logit"
    keep = trained_vit.KEEP

    def __init__(self, calibrated: int = 512, tested: int = 5000) -> None:
        train, test = fashion.split(fashion.read(fashion.archive()))
        self.model = trained_vit.trained()
        self.labels = test.labels[:tested]
        self.calibration = _batches(train.inputs()[:calibrated])
        self.tests = _batches(test.inputs()[:tested])

    def output(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """Logits."""
        return model(**inputs).logits

    def settings(self) -> list[str]:
        return [*super().settings(), QAT, QAT_OWN]

    def quantized(self, setting: str) -> nn.Module:
        if setting in (QAT, QAT_OWN):
            return qat.prepared(trained_vit.tuned(), self.keep)
        return super().quantized(setting)

    def target(self, setting: str) -> nn.Module:
        return trained_vit.tuned() if setting == QAT_OWN else super().target(setting)

    def right(self, setting: str, variant: str = "none") -> Tensor:
        """float32 (images,), 1 where the classifier is right."""
        return (self.outputs(setting, variant).argmax(1) == self.labels).float()

    def cell(self, setting: str, variant: str) -> str:
        right, plain, floor = self.right(setting, variant), self.right(setting), self.right("float")
        error = (self.outputs(setting, variant) - self.outputs("float")).square().mean()
        text = f"{100 * right.mean():.2f}"
        if variant != "none":
            text += f" ± {100 * standard_error(right - plain):.2f}"
            lost = floor - plain
            if lost.mean() > 2 * standard_error(lost):
                text += f" ({(right - plain).mean() / lost.mean():.0%})"
        return text if setting == "float" else f"{text} / {error:.3g}"


class Encoder(Subject):
    """all-MiniLM-L6-v2 on paragraphs of Wikipedia; judged by how like its float self it is."""

    name = "minilm"
    title = "all-MiniLM-L6-v2 on Wikipedia: cosine to the float embedding / % of 10 nearest kept"
    keep = ("embeddings*", "pooler*")

    def __init__(self, length: int = 64) -> None:
        self.model = BertModel.from_pretrained(real.minilm()).eval()
        tokenizer = AutoTokenizer.from_pretrained(real.minilm())

        def batches(texts: list[str]) -> list[dict[str, Tensor]]:
            settings = {"padding": True, "truncation": True, "max_length": length}
            return [
                dict(tokenizer(texts[i : i + 32], return_tensors="pt", **settings))
                for i in range(0, len(texts), 32)
            ]

        self.calibration, self.tests = map(batches, real.paragraphs())

    def output(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """Embeddings of length 1: the mean over tokens, as the model is meant to be used."""
        mask = inputs["attention_mask"][..., None]
        hidden = model(**inputs).last_hidden_state
        return nn.functional.normalize((hidden * mask).sum(1), dim=1)

    def neighbours(self, setting: str, variant: str = "none") -> Tensor:
        """int64 (paragraphs, NEIGHBOURS), the nearest other paragraphs of each."""
        outputs = self.outputs(setting, variant)
        return (outputs @ outputs.T).fill_diagonal_(-2).topk(NEIGHBOURS).indices

    def kept(self, setting: str, variant: str) -> Tensor:
        """float32 (paragraphs,), the share of each one's neighbours that the float model shares."""
        same = self.neighbours(setting, variant)[:, :, None] == self.neighbours("float")[:, None]
        return same.any(-1).float().mean(1)

    def cell(self, setting: str, variant: str) -> str:
        cosine = (self.outputs(setting, variant) * self.outputs("float")).sum(1).mean()
        kept = self.kept(setting, variant)
        text = f"{cosine:.4f} / {100 * kept.mean():.1f}"
        if variant != "none":
            text += f" ± {100 * standard_error(kept - self.kept(setting, 'none')):.1f}"
        return text


def _batches(pixels: Tensor) -> list[dict[str, Tensor]]:
    return [{"pixel_values": part} for part in pixels.split(64)]


def standard_error(differences: Tensor) -> float:
    """Of the mean of paired ``differences``."""
    return float(differences.std() / len(differences) ** 0.5)
