"""What the comparison measures: all variants of a model at one width, on one choice of data."""

from __future__ import annotations

import json
import os
import shutil
import time
import traceback
from collections.abc import Callable

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import torch
from rig.folders import CACHE
from rig.quantizers.pipelines import PIPELINES
from rig.subjects import real
from transformers import AutoModelForCausalLM, AutoTokenizer

import bc_plugin
from bc_plugin import Compensation, FloatLogits, RefinementConfig
from bc_plugin.calibration.sample import sample_from

FOLDER = CACHE / "comparison"
GROUP_SIZE, SAMPLES, LENGTH, EVALUATED = 64, 32, 512, 12
# What is trained sees more text than what is computed: 64 steps of 2,048 tokens, each seen twice.
REFINED_SAMPLES, STEPS = 128, 64
REFINEMENT = {"steps": STEPS, "mixed_precision": "bf16", "evaluate_every": 16, "held_out": 1 / 32}
RANK = 32
CONFIGS = {
    "linear": {"positions": 0, "sites": ["linear"]},
    "BC 0": {"positions": 0},
    "BC 1": {"positions": 1},
    "all": {"positions": "all", "max_tokens": None},
}


class Part:
    """All variants at one width, with one choice of calibration data."""

    def __init__(self, bits: int, seed: int) -> None:
        self.bits, self.seed = bits, seed
        self.folder = FOLDER / f"{bits}-{seed}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.source = real.smollm2()
        self.tokenizer = AutoTokenizer.from_pretrained(self.source)
        self.calibration = real.calibration_windows(self.tokenizer, LENGTH, SAMPLES, seed)
        self.more = real.calibration_windows(self.tokenizer, LENGTH, REFINED_SAMPLES, seed)
        self.batches = real.held_out_windows(self.tokenizer, LENGTH, EVALUATED)
        self.reference = AutoModelForCausalLM.from_pretrained(self.source).eval()
        self.path = self.folder / "found.json"
        self.found = json.loads(self.path.read_text()) if self.path.exists() else {}

    def run(self) -> None:
        """Measure what is missing."""
        if "float" not in self.found:
            self.measure("float", self.reference, 0.0)
        self.plain = self.quantized("plain", None)
        if "none" not in self.found:
            self.measure("none", self.load("plain"), 0.0)
        for variant, config in CONFIGS.items():
            if variant not in self.found:
                self.compensated(variant, self.calibration, config)
        if "self" not in self.found:
            start = time.perf_counter()
            own = sample_from(self.reference, self.tokenizer, LENGTH, SAMPLES, self.seed)
            self.compensated("self", own, CONFIGS["BC 1"], time.perf_counter() - start)
        for positions in (1, 0):
            variant = f"joint {positions}"
            if variant not in self.found:
                seconds = self.quantized(variant, {"positions": positions})
                self.measure(variant, self.load(variant), seconds - self.plain)
            if f"refined {positions}" not in self.found:
                self.refined(f"refined {positions}", variant, {})
        if "block 1" not in self.found:
            self.refined("block 1", "joint 1", {"by": "block", "steps": 16})
        for variant, peer in (("gptaq", self.gptaq), ("eora", self.eora)):
            if variant not in self.found:
                self.attempt(variant, peer)

    def quantized(self, name: str, flag, **changes) -> float:
        """Quantize with gptqmodel and save, unless that was done before; returns the seconds."""
        pipeline = PIPELINES["gptqmodel"]
        folder = self.folder / name.replace(" ", "-")
        record = folder / "seconds.json"
        if not record.exists():
            shutil.rmtree(folder, ignore_errors=True)
            torch.manual_seed(0)
            settings = {"bits": self.bits, "group_size": GROUP_SIZE, **pipeline.settings, **changes}
            start = time.perf_counter()
            qmodel = pipeline.quantize(str(self.source), self.calibration, flag, settings)
            seconds = time.perf_counter() - start
            pipeline.save(qmodel, folder)
            record.write_text(json.dumps(seconds))
        return json.loads(record.read_text())

    def load(self, name: str):
        """A saved model."""
        return AutoModelForCausalLM.from_pretrained(self.folder / name.replace(" ", "-")).eval()

    def compensated(self, variant: str, calibration, config, before: float = 0.0) -> None:
        """Compute vectors for plain GPTQ's weights."""
        model = self.load("plain")
        compensation = bc_plugin.compensate(model, self.reference, calibration, config)
        compensation.attach(model)
        self.measure(variant, model, before + compensation.seconds)

    def refined(self, variant: str, start_from: str, settings) -> None:
        """Train the vectors of a model that was quantized jointly with them."""
        model = self.load(start_from)
        config = RefinementConfig(**{**REFINEMENT, **settings})
        reference, seconds = self.reference, 0.0
        if config.by == "model":
            reference, seconds = self.float_logits(config)
        start = time.perf_counter()
        bc_plugin.refine(model, reference, self.more, config)
        seconds += time.perf_counter() - start
        self.measure(variant, model, self.found[start_from]["seconds"] + seconds)

    def float_logits(self, config: RefinementConfig) -> tuple[FloatLogits, float]:
        """What the float model predicts, and the seconds it took to record that."""
        folder = FOLDER / f"float-logits-{self.seed}"
        record = folder / "seconds.json"
        start = time.perf_counter()
        found = bc_plugin.record_float_logits(self.reference, self.more, config, folder=folder)
        if not record.exists():
            record.write_text(json.dumps(time.perf_counter() - start))
        return found, json.loads(record.read_text())

    def attempt(self, variant: str, peer: Callable[[], None]) -> None:
        """What does not run here is said in the table."""
        try:
            peer()
        except Exception as error:
            traceback.print_exc()
            self.keep(variant, {"error": f"{type(error).__name__}: {error}"})

    def gptaq(self) -> None:
        from gptqmodel.quantization.config import GPTAQConfig

        seconds = self.quantized("gptaq", None, gptaq=GPTAQConfig(device="cpu"))
        self.measure("gptaq", self.load("gptaq"), seconds - self.plain)

    def eora(self) -> None:
        from gptqmodel import GPTQModel
        from gptqmodel.adapter.adapter import Lora

        folder = self.folder / "eora"
        start = time.perf_counter()
        GPTQModel.adapter.generate(
            adapter=Lora(rank=RANK, path=str(folder)),
            model_id_or_path=str(self.source),
            quantized_model_id_or_path=str(self.folder / "plain"),
            calibration_dataset=self.calibration,
            device="cpu",
        )
        seconds = time.perf_counter() - start
        adapter = Lora(rank=RANK, path=str(folder))
        model = GPTQModel.load(str(self.folder / "plain"), adapter=adapter, device="cpu").model
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        added = sum(RANK * (m.in_features + m.out_features) for m in self.linears())
        self.measure("eora", model, seconds, size, added)

    def norm(self) -> None:
        """Norm tuning with the refinement's budget; in an environment with gptqmodel 7.7."""
        from gptqmodel import BACKEND, GPTQModel, NormConfig

        start = time.perf_counter()
        qmodel = GPTQModel.load(str(self.folder / "plain"), backend=BACKEND.TORCH, device="cpu")
        norm = NormConfig(teacher=self.reference, steps=STEPS)
        with torch.autocast("cpu", torch.bfloat16):  # as the refinement has it
            qmodel.requantize(calibration=self.more, norm=norm, batch_size=4)
        self.measure("norm", qmodel.model, time.perf_counter() - start)

    def measure(
        self, variant: str, model, seconds: float, size: int | None = None, added: int | None = None
    ) -> None:
        """Evaluate a variant; its vectors, if it has any, tell what it costs."""
        reference = None if model is self.reference else self.reference
        compensation = Compensation.attached_to(model)
        if compensation is not None:
            size = compensation.nbytes
            added = sum(v.shape[-1] for v in compensation.vectors.values())
        products = sum(m.in_features * m.out_features for m in self.linears())
        found = bc_plugin.evaluate(model, self.batches, reference).to_dict()
        costs = {"bytes": size or 0, "seconds": seconds, "work": (added or 0) / products}
        self.keep(variant, {**found, **costs})

    def linears(self) -> list[torch.nn.Linear]:
        """Those that are quantized."""
        blocks = self.reference.model.layers
        return [m for m in blocks.modules() if isinstance(m, torch.nn.Linear)]

    def keep(self, variant: str, result: dict) -> None:
        self.found[variant] = result
        self.path.write_text(json.dumps(self.found))
