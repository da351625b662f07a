"""The loop that trains vectors: Adam, warm-up and cosine; held-out data decide what is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import BiasCompensationError
from ..ranks import are_several, summed
from .config import RefinementConfig
from .data import RefinementData
from .parameters import Trained, TrainedForward
from .progress import Progress

Loss = Callable[[int], Tensor]


@dataclass(frozen=True)
class Outcome:
    """What training came to.

    Attributes:
        vectors: The best ones, float32, by site.
        weights: The best scales and norms, float32, by name.
        before, after: Held-out loss at the start and of the best.
        steps: Steps that were made.
    """

    vectors: dict[str, Tensor]
    before: float
    after: float
    steps: int
    weights: dict[str, Tensor] = field(default_factory=dict)


def learning_rate_factor(step: int, steps: int, warmup: float) -> float:
    """Linear from 0 over the warm-up, then half a cosine down to 0."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


class Training:
    """Training of some sites' vectors, and of scales and norms.

    The same on every rank: each works on its part of a batch, and gradients and losses are those of
    the whole.

    Args:
        sites: Those in place, by name; the ones whose ``step`` requires a gradient are trained.
        loss: Gives, for the number of a batch, the loss of this rank's part, summed over tokens.
        tokens: By number of a batch, how many these are; without the batches of which this rank
            has no part.
        data: Which batches are trained on, and which decide what is kept.
        config: How.
        progress: Where a stopped run goes on from.
        name: This training's name there.
    """

    def __init__(
        self,
        sites: Mapping[str, Trained],
        loss: Loss,
        tokens: Mapping[int, int],
        data: RefinementData,
        config: RefinementConfig,
        progress: Progress,
        name: str,
    ) -> None:
        self.sites, self.loss, self.config = sites, loss, config
        self.fitted, self.apart, self.own = data.fitted, data.apart, set(tokens)
        own = torch.tensor([tokens.get(number, 0) for number in range(len(data.batches))])
        self.tokens: list[int] = summed([own])[0].tolist()
        self.progress, self.name = progress, name
        # In an order of their own: a compensation that was saved and loaded has another.
        self.places = {name: site.step for name, site in sorted(sites.items())}
        self.steps = {name: step for name, step in self.places.items() if step.requires_grad}
        self.device = next(iter(self.steps.values())).device.type
        self.rates = {
            "vectors": config.learning_rate,
            "scales": config.scales_learning_rate,
            "norms": config.norms_learning_rate,
        }
        groups = {kind: [] for kind in self.rates}
        for name, step in self.steps.items():
            groups[sites[name].kind].append(step)
        self.optimizer = torch.optim.Adam(
            [{"params": steps, "kind": kind} for kind, steps in groups.items() if steps],
            betas=(0.9, 0.95),
        )

    def run(self, bar: tqdm) -> Outcome:
        """Train to the end, or until held-out data sees nothing better for a while."""
        state = self.progress.read(self.name) or self._start()
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
            for name, step in self.places.items():
                step.copy_(state["kept"][name])
            vectors, weights = (
                {n: s.value() for n, s in self.sites.items() if (s.kind == "vectors") == wanted}
                for wanted in (True, False)
            )
        return Outcome(vectors, state["before"], state["best"], state["done"], weights)

    def _start(self) -> dict[str, Any]:
        """Where training starts: with the vectors there are, or with none if that is better.

        Each takes out a mean of its own module, which may be what made up for another's: whoever
        tunes blocks as a whole, as AutoRound does, leaves such.
        """
        given = self._look(None, 0)
        vectors = [site for site in self.sites.values() if isinstance(site, TrainedForward)]
        if not any(site.step.requires_grad for site in vectors):
            return given
        for site in vectors:
            site.take_out()
        without = self._look(given, 0)
        return without if without["best"] < given["best"] else given

    def _restore(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for name, step in self.places.items():
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
        return {name: step.detach().cpu().clone() for name, step in self.places.items()}

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
        total = torch.zeros((), dtype=torch.float64)
        for number in filter(self.own.__contains__, batches):
            with torch.autocast(self.device, torch.bfloat16, self.config.mixed_precision == "bf16"):
                loss = self.loss(number) / (self.tokens[number] * len(batches))
            loss.backward()
            total += loss.item()
        total = self._of_all_ranks(total)
        if not math.isfinite(total):
            raise BiasCompensationError(
                f"the loss is not finite at step {step}; use a smaller learning_rate."
            )
        factor = learning_rate_factor(step, self.config.steps, self.config.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rates[group["kind"]] * factor
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total

    def _of_all_ranks(self, loss: Tensor) -> float:
        """The loss of a step over all ranks; gradients become those of all, too."""
        if are_several():
            steps = list(self.steps.values())
            own = [torch.zeros_like(s) if s.grad is None else s.grad for s in steps]
            loss, *gradients = summed([loss, *own])
            for step, gradient in zip(steps, gradients, strict=True):
                step.grad = gradient
        return loss.item()

    @torch.no_grad()
    def evaluate(self) -> float:
        """The held-out loss, a mean over tokens."""
        own = [self.loss(number).double().cpu() for number in self.apart if number in self.own]
        (total,) = summed([sum(own, torch.zeros((), dtype=torch.float64))])
        return total.item() / sum(self.tokens[number] for number in self.apart)
