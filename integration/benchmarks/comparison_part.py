"""One model at one width, on one choice of data: what the comparison's variants share."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import torch
from rig.folders import CACHE
from rig.quantizers.pipelines import PIPELINES
from rig.subjects import real
from transformers import AutoModelForCausalLM, AutoTokenizer

import bc_plugin
from bc_plugin import Compensation, FloatLogits, RefinementConfig
from bc_plugin.calibration.batches import rebatch

FOLDER = CACHE / "comparison"
GROUP_SIZE, SAMPLES, LENGTH, EVALUATED = 64, 32, 512, 12
# What is trained sees more text than what is computed: 64 steps of 2,048 tokens, each seen once, as
# it is soon learned by heart.
REFINED_SAMPLES, STEPS = 256, 64
TOGETHER = 4  # sequences in a batch, so that kernels unpack their weights less often
REFINEMENT = {"steps": STEPS, "evaluate_every": 16, "held_out": 1 / 32}


class Part:
    """What is measured is kept in ``found``, and checkpoints beside it, for a later run.

    Args:
        bits: The width of the integers.
        seed: Of the choice of calibration sequences.
    """

    def __init__(self, bits: int, seed: int) -> None:
        self.bits, self.seed = bits, seed
        self.folder = FOLDER / f"{bits}-{seed}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.source = real.smollm2()
        self.tokenizer = AutoTokenizer.from_pretrained(self.source)
        self.calibration = real.calibration_windows(self.tokenizer, LENGTH, SAMPLES, seed)
        self.more = real.calibration_windows(self.tokenizer, LENGTH, REFINED_SAMPLES, seed)
        self.batches = rebatch(
            real.held_out_windows(self.tokenizer, LENGTH, EVALUATED), TOGETHER * LENGTH
        )
        self.reference = AutoModelForCausalLM.from_pretrained(self.source).eval()
        self.path = self.folder / "found.json"
        self.found = json.loads(self.path.read_text()) if self.path.exists() else {}

    def quantized(self, name: str, flag: Any = None, **changes: Any) -> float:
        """Quantize with gptqmodel and save, unless that was done before; returns the seconds."""
        pipeline = PIPELINES["gptqmodel"]

        def quantize(folder: Path) -> None:
            torch.manual_seed(0)
            # Processors without bfloat16 take many times as long in gptqmodel's own choice.
            settings = {"bits": self.bits, "group_size": GROUP_SIZE, "dtype": torch.float32}
            settings |= {**pipeline.settings, **changes}
            qmodel = pipeline.quantize(str(self.source), self.calibration, flag, settings)
            pipeline.save(qmodel, folder)

        return self.made(name, quantize)

    def made(self, name: str, make: Any) -> float:
        """Have ``make`` write a checkpoint, unless it is there; returns the seconds it took."""
        folder = self.folder / name
        record = folder / "seconds.json"
        if not record.exists():
            shutil.rmtree(folder, ignore_errors=True)
            start = time.perf_counter()
            make(folder)
            record.write_text(json.dumps(time.perf_counter() - start))
        return json.loads(record.read_text())

    def load(self, name: str) -> torch.nn.Module:
        """A saved model."""
        return AutoModelForCausalLM.from_pretrained(self.folder / name).eval()

    def compensated(
        self, variant: str, start: str, config: dict, calibration: list | None = None
    ) -> None:
        """Compute vectors for a checkpoint's weights, in place of those it has, and save it."""
        model = self.load(start)
        attached = Compensation.attached_to(model)
        if attached is not None:
            attached.detach(model)
        calibration = self.calibration if calibration is None else calibration
        compensation = bc_plugin.compensate(model, self.reference, calibration, config)
        compensation.attach(model)
        self.made(variant, model.save_pretrained)
        self.measure(variant, model, compensation.seconds)

    def refined(self, variant: str, start: str, settings: dict) -> None:
        """Train a model that ``compensated`` saved."""
        model = self.load(start)
        config = RefinementConfig(**{**REFINEMENT, **settings})
        reference, seconds = self.reference, 0.0
        if config.by == "model":
            reference, seconds = self.float_logits(config)
        begin = time.perf_counter()
        found = bc_plugin.refine(model, reference, self.more, config)
        seconds += time.perf_counter() - begin
        self.made(variant, model.save_pretrained)
        self.measure(variant, model, seconds)
        self.keep(variant, {**self.found[variant], "refined": found.refined})

    def float_logits(self, config: RefinementConfig) -> tuple[FloatLogits, float]:
        """What the float model predicts, and the seconds it took to record that."""
        folder = FOLDER / f"float-logits-{self.seed}"
        record = folder / "seconds.json"
        start = time.perf_counter()
        found = bc_plugin.record_float_logits(self.reference, self.more, config, folder=folder)
        if not record.exists():
            record.write_text(json.dumps(time.perf_counter() - start))
        return found, json.loads(record.read_text())

    def measure(
        self,
        variant: str,
        model: torch.nn.Module,
        seconds: float,
        size: int = 0,
        added: int = 0,
    ) -> None:
        """Evaluate a variant.

        Args:
            seconds: What its own step took, without what it starts from.
            size, added: Bytes and operations per token beyond the quantized model's, if they are
                not its vectors'.
        """
        reference = None if model is self.reference else self.reference
        compensation = Compensation.attached_to(model)
        if compensation is not None:
            size = compensation.nbytes
            added = sum(v.shape[-1] for v in compensation.vectors.values())
        products = sum(m.in_features * m.out_features for m in self.linears())
        found = bc_plugin.evaluate(model, self.batches, reference).to_dict()
        self.keep(variant, {**found, "bytes": size, "seconds": seconds, "work": added / products})

    def linears(self) -> list[torch.nn.Linear]:
        """Those that are quantized."""
        blocks = self.reference.model.layers
        return [m for m in blocks.modules() if isinstance(m, torch.nn.Linear)]

    def keep(self, variant: str, result: dict) -> None:
        """Write what was found of a variant."""
        self.found[variant] = result
        self.path.write_text(json.dumps(self.found))
