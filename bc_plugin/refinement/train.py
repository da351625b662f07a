"""The loop that trains vectors: Adam, warm-up and cosine; held-out data decide what is kept."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import BiasCompensationError
from ..files import written_whole
from .config import RefinementConfig
from .parameters import TrainedForward

RUN, STATE = "refinement.json", "refinement-"
Loss = Callable[[int], tuple[Tensor, int]]


@dataclass(frozen=True)
class Outcome:
    """What training came to.

    Attributes:
        vectors: The best ones, float32, by site.
        before, after: Held-out loss at the start and of the best.
        steps: Steps that were made.
    """

    vectors: dict[str, Tensor]
    before: float
    after: float
    steps: int


class Progress:
    """What a run has reached, on disk, for when it is stopped.

    Args:
        folder: Where to keep it; None to keep nothing.
        identity: Whatever makes this run another one than those before.

    Raises:
        BiasCompensationError: the folder holds another run's progress.
    """

    def __init__(self, folder: Path | None, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        if folder is None:
            return
        text = json.dumps(identity, sort_keys=True)
        path = folder / RUN
        if path.is_file() and path.read_text(encoding="utf-8") != text:
            raise BiasCompensationError(
                f"{folder} holds the progress of a refinement of another checkpoint, on other data "
                "or with other settings; delete it or name another folder."
            )
        with written_whole(path) as part:
            part.write_text(text, encoding="utf-8")

    @property
    def float_logits(self) -> Path:
        """Where to keep what the float model predicts."""
        return self.folder / "float_logits"

    def _path(self, name: str) -> Path:
        return self.folder / f"{STATE}{name}.pt"

    def read(self, name: str) -> dict[str, Any] | None:
        """What ``write`` wrote last under this name."""
        if self.folder is None or not self._path(name).is_file():
            return None
        return torch.load(self._path(name), weights_only=True)

    def write(self, name: str, state: dict[str, Any]) -> None:
        """Keep a state, in place of the last one under this name."""
        if self.folder is not None:
            with written_whole(self._path(name)) as part:
                torch.save(state, part)

    def delete(self) -> None:
        """Remove it once the run has come to its end, and the folder if nothing else is there."""
        if self.folder is None:
            return
        for path in (self.folder / RUN, *self.folder.glob(f"{STATE}*")):
            path.unlink(missing_ok=True)
        for path in self.float_logits.glob("*.safetensors"):
            path.unlink()
        for folder in (self.float_logits, self.folder):
            with contextlib.suppress(OSError):
                folder.rmdir()


def checksum(tensors: Iterable[Tensor]) -> str:
    """A fingerprint of tensors' values."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def learning_rate_factor(step: int, steps: int, warmup: float) -> float:
    """Linear from 0 over the warm-up, then half a cosine down to 0."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


class Training:
    """Training of some sites' vectors.

    Args:
        sites: Those in place; the ones whose ``step`` requires a gradient are trained.
        loss: Gives, for the number of a batch, the mean loss and the number of tokens.
        fitted: Numbers of the batches that are trained on.
        held_out: Numbers of the batches that decide what is kept.
        config: How.
        progress: Where a stopped run goes on from.
        name: This training's name there.
    """

    def __init__(
        self,
        sites: Mapping[str, TrainedForward],
        loss: Loss,
        fitted: Sequence[int],
        held_out: Sequence[int],
        config: RefinementConfig,
        progress: Progress,
        name: str,
    ) -> None:
        self.sites, self.loss, self.config = sites, loss, config
        self.fitted, self.held_out = fitted, held_out
        self.progress, self.name = progress, name
        self.steps = {n: site.step for n, site in sites.items() if site.step.requires_grad}
        self.device = next(iter(self.steps.values())).device.type
        self.optimizer = torch.optim.Adam(
            list(self.steps.values()), lr=config.learning_rate, betas=(0.9, 0.95)
        )

    def run(self, bar: tqdm) -> Outcome:
        """Train to the end, or until held-out data sees nothing better for a while."""
        state = self.progress.read(self.name) or self._look(None, 0)
        self._restore(state)
        bar.update(state["done"])
        while state["done"] < self.config.steps and state["waited"] < self.config.patience:
            upto = min(state["done"] + self.config.evaluate_every, self.config.steps)
            for step in range(state["done"], upto):
                bar.set_postfix(loss=f"{self._step(step):.4f}", held_out=f"{state['best']:.4f}")
                bar.update()
            state = self._look(state, upto)
            self.progress.write(self.name, state)
        bar.update(self.config.steps - state["done"])
        with torch.no_grad():
            for name, step in self.steps.items():
                step.copy_(state["kept"][name])
            vectors = {name: site.vectors() for name, site in self.sites.items()}
        return Outcome(vectors, state["before"], state["best"], state["done"])

    def _restore(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for name, step in self.steps.items():
                step.copy_(state["now"][name])
        self.optimizer.load_state_dict(state["optimizer"])

    def _look(self, last: dict[str, Any] | None, done: int) -> dict[str, Any]:
        """Where training is after ``done`` steps; ``last`` is where the last look found it."""
        found, now = self.evaluate(), self._now()
        better = last is None or found < last["best"]
        return {
            "done": done,
            "waited": 0 if better else last["waited"] + 1,
            "before": found if last is None else last["before"],
            "best": found if better else last["best"],
            "kept": now if better else last["kept"],
            "now": now,
            "optimizer": self.optimizer.state_dict(),
        }

    def _now(self) -> dict[str, Tensor]:
        return {name: step.detach().cpu().clone() for name, step in self.steps.items()}

    def _batches(self, step: int) -> list[int]:
        """The batches of a step: each epoch in an order of its own."""
        count = self.config.gradient_accumulation_steps
        chosen = []
        for number in range(step * count, (step + 1) * count):
            epoch, place = divmod(number, len(self.fitted))
            generator = torch.Generator().manual_seed(self.config.seed + epoch)
            order = torch.randperm(len(self.fitted), generator=generator)
            chosen.append(self.fitted[order[place]])
        return chosen

    def _step(self, step: int) -> float:
        batches = self._batches(step)
        total = 0.0
        for number in batches:
            with torch.autocast(self.device, torch.bfloat16, self.config.mixed_precision == "bf16"):
                loss = self.loss(number)[0] / len(batches)
            loss.backward()
            total += loss.item()
        if not math.isfinite(total):
            raise BiasCompensationError(
                f"the loss is not finite at step {step}; use a smaller learning_rate."
            )
        factor = learning_rate_factor(step, self.config.steps, self.config.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * factor
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total

    @torch.no_grad()
    def evaluate(self) -> float:
        """The held-out loss, a mean over tokens."""
        total, tokens = 0.0, 0
        for number in self.held_out:
            loss, count = self.loss(number)
            total += loss.item() * count
            tokens += count
        return total / tokens
