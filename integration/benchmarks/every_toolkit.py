"""Every toolkit and method on SmolLM2-135M: without compensation, with it, and quantized jointly.

    make benchmark-toolkits

runs this in both environments and prints one table. Parts of the table that an interrupted run has
measured are not measured again; ``--again`` starts anew. ``--only NAME`` takes one toolkit,
``--measure NAME BITS`` does the work for one part, in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import torch
from rich.console import Console
from rich.table import Table
from rig.folders import CACHE
from rig.quantizers.pipelines import PIPELINES, model_of
from rig.subjects import real
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import bc_plugin
from bc_plugin import Compensation, RefinementConfig
from bc_plugin.calibration.batches import rebatch

FOLDER = CACHE / "every_toolkit"
GROUP_SIZE, SAMPLES, LENGTH, EVALUATED = 64, 32, 512, 12
TOGETHER = 4  # windows in a batch, so that kernels unpack their weights less often
# A few steps of one batch each, which is seen once; the comparison has more.
STEPS, HELD_OUT = 16, 8
REFINED_SAMPLES = TOGETHER * STEPS + HELD_OUT
PARTS = [(name, bits) for bits in (3, 4) for name in ("gptqmodel", "transformers", "auto_gptq")] + [
    ("gptqmodel-awq", 4),
    ("autoawq", 4),
    ("llmcompressor", 3),
    ("llmcompressor", 4),
    ("llmcompressor-nearest", 4),
    ("llmcompressor-awq", 4),
    *(("autoround", bits) for bits in (2, 3, 4)),
]


VARIANTS = ("float", "none", "BC 0", "BC 1", "joint 0", "joint 1", "refined 1")
# The other toolkits share its method; one value of ``positions`` shows that they share its results.
BOTH_POSITIONS = ("gptqmodel", "gptqmodel-awq", "llmcompressor")
REFINED = ("awq", "llmcompressor", "autoround")  # what is in a toolkit's name
OWN_SETTINGS = {
    "transformers": {"modules_in_block_to_quantize": real.TOGETHER},
    # Its "light" recipe, with half the batch: the default one takes several times as long.
    "autoround": {"iters": 50, "lr": 5e-3, "batch_size": 4},
}
METHODS = {"awq": "AWQ", "nearest": "nearest", "autoround": "AutoRound"}


class Remembered(nn.Module):
    """A model that is asked the same again and again, and computes it once."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.outputs = model, {}

    def forward(self, input_ids, **rest):
        asked = input_ids.numpy().tobytes()
        if asked not in self.outputs:
            self.outputs[asked] = self.model(input_ids, **rest)
        return self.outputs[asked]


class Measurement:
    """One toolkit at one width, on the same calibration data and the same held-out tokens."""

    def __init__(self, name: str, bits: int) -> None:
        self.pipeline, self.bits = PIPELINES[name], bits
        self.source = real.smollm2()
        self.tokenizer = AutoTokenizer.from_pretrained(self.source)
        self.calibration = real.calibration_windows(self.tokenizer, LENGTH, SAMPLES)
        self.batches = rebatch(
            real.held_out_windows(self.tokenizer, LENGTH, EVALUATED), TOGETHER * LENGTH
        )
        self.reference = AutoModelForCausalLM.from_pretrained(
            self.source, dtype=torch.float32
        ).eval()
        self.predictions = Remembered(self.reference)
        self.positions = (1, 0) if name in BOTH_POSITIONS else (1,)
        self.path = result_of(name, bits)
        self.found = json.loads(self.path.read_text()) if self.path.exists() else {}

    def run(self) -> None:
        wanted = set(self.wanted()) - set(self.found)
        if not wanted:
            return
        self.evaluate("float", self.reference)
        if "awq" in self.pipeline.name:  # the scales it moves are known only while it runs
            for positions in reversed(self.positions):
                model = self.quantized({"positions": positions})
                self.evaluate(f"BC {positions}", model)
            Compensation.attached_to(model).detach(model)
            self.evaluate("none", model)
            self.refine(self.pipeline.load(self.folder()))
            return
        of_joint = set()
        if self.pipeline.joint:
            of_joint = {"refined 1", *(f"joint {positions}" for positions in self.positions)}
        if wanted - of_joint:
            self.compensate_afterwards()
        for positions in reversed(self.positions):  # so that the last is there to be refined
            if f"joint {positions}" in wanted:
                self.evaluate(f"joint {positions}", self.quantized({"positions": positions}))
        if "refined 1" in wanted & of_joint:
            self.refine(self.pipeline.load(self.folder()))

    def wanted(self) -> list[str]:
        """What this part of the table consists of."""
        kinds = ("BC", "joint") if self.pipeline.joint else ("BC",)
        variants = [f"{kind} {p}" for kind in kinds for p in self.positions]
        refined = any(word in self.pipeline.name for word in REFINED)
        return ["float", "none", *variants, *(["refined 1"] if refined else [])]

    def refine(self, model) -> None:
        """Go on from the closed form with positions=1."""
        data = real.calibration_windows(self.tokenizer, LENGTH, REFINED_SAMPLES)
        share = HELD_OUT / REFINED_SAMPLES
        settings = {"steps": STEPS, "evaluate_every": STEPS, "held_out": share}
        config = RefinementConfig(train="vectors", **settings)
        if model.dtype == torch.float16:  # too coarse to train in
            model = AutoModelForCausalLM.from_pretrained(self.folder(), dtype=torch.float32)
        floats = bc_plugin.record_float_logits(
            self.reference, data, config, folder=FOLDER / "float-logits"
        )
        bc_plugin.refine(model, floats, data, config)
        self.evaluate("refined 1", model)

    def compensate_afterwards(self) -> None:
        """The same weights without and with vectors."""
        model = self.quantized(None)
        vectors = {
            positions: bc_plugin.compensate(
                model, self.reference, self.calibration, {"positions": positions}
            )
            for positions in reversed(self.positions)
        }
        self.evaluate("none", model)
        for positions, compensation in vectors.items():
            compensation.attach_unchecked(model)  # it is the model they were computed for
            self.evaluate(f"BC {positions}", model)
            if positions == 1 and not self.pipeline.joint and "refined 1" in self.wanted():
                self.refine(model)
            else:
                compensation.detach(model)

    def folder(self) -> Path:
        return FOLDER / f"{self.pipeline.name}-{self.bits}"

    def quantized(self, flag):
        """Quantized with the toolkit's option, saved, and loaded again."""
        torch.manual_seed(0)
        folder = self.folder()
        shutil.rmtree(folder, ignore_errors=True)
        settings = {"bits": self.bits, "group_size": GROUP_SIZE, **self.pipeline.settings}
        settings |= OWN_SETTINGS.get(self.pipeline.name, {})
        result = self.pipeline.quantize(str(self.source), self.calibration, flag, settings)
        attached = Compensation.attached_to(model_of(result))
        assert (attached is not None) == (flag is not None)
        self.pipeline.save(result, folder)
        model = self.pipeline.load(folder)
        return written_out(model, self.reference) if self.pipeline.name == "autoround" else model

    def evaluate(self, variant: str, model) -> None:
        reference = None if model is self.reference else self.predictions
        found = bc_plugin.evaluate(model, self.batches, reference)
        self.found[variant] = found.to_dict()
        self.path.write_text(json.dumps(self.found))


@torch.no_grad()
def written_out(model: nn.Module, reference: nn.Module) -> nn.Module:
    """In float32, with the weights of its quantized linears: AutoRound runs it in float16."""
    nn.Module.float(model)
    for path, linear in reference.named_modules():
        if isinstance(linear, nn.Linear) and hasattr(model.get_submodule(path), "qweight"):
            weight = model.get_submodule(path)(torch.eye(linear.in_features)).T
            plain = nn.Linear(linear.in_features, linear.out_features, bias=False)
            plain.weight.copy_(weight)
            model.set_submodule(path, plain)
    return model


def result_of(name: str, bits: int) -> Path:
    return FOLDER / f"{name}-{bits}.json"


def measure(name: str, bits: int) -> None:
    bc_plugin.enable()
    with PIPELINES[name].on_cpu():
        Measurement(name, bits).run()


def print_table(parts) -> None:
    table = Table("toolkit", "method", "", "perplexity", "gap closed", "KL (nats)", "KL, of none")
    for name, bits in parts:
        found = json.loads(result_of(name, bits).read_text())
        method = next((METHODS[part] for part in METHODS if part in name), "GPTQ")
        floor, plain = found["float"]["perplexity"], found["none"]
        for variant in VARIANTS:
            if variant not in found:
                continue
            row = found[variant]
            compensated = variant not in ("float", "none")
            closed = (plain["perplexity"] - row["perplexity"]) / (plain["perplexity"] - floor)
            label, _, positions = variant.partition(" ")
            label = {"joint": "BC + joint", "refined": "BC + refinement"}.get(label, label)
            table.add_row(
                name.removesuffix("-awq").removesuffix("-nearest"),
                f"{method} {bits} bits",
                f"{label}, positions={positions}" if compensated else label,
                f"{row['perplexity']:.2f}",
                f"{closed:.0%}" if compensated else "",
                "" if variant == "float" else f"{row['kl']:.3f}",
                f"{row['kl'] / plain['kl']:.2f}" if compensated else "",
            )
        table.add_section()
    table.title = (
        f"SmolLM2-135M, group {GROUP_SIZE}; {plain['tokens']} tokens of held-out Wikipedia"
    )
    Console(width=110).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", nargs=2, metavar=("NAME", "BITS"))
    parser.add_argument("--only", choices=PIPELINES)
    parser.add_argument("--legacy", help="the Python of the environment that has AutoGPTQ")
    parser.add_argument("--llmcompressor", help="that of the one that has llm-compressor")
    parser.add_argument("--again", action="store_true")
    given = parser.parse_args()
    if given.measure:
        measure(given.measure[0], int(given.measure[1]))
        return
    if given.again:
        shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True, exist_ok=True)
    parts = [part for part in PARTS if given.only in (None, part[0])]
    for name, bits in parts:
        option = "llmcompressor" if name.startswith("llmcompressor") else "legacy"
        python = sys.executable if PIPELINES[name].installed else getattr(given, option)
        if python is None:
            parser.error(f"{name} is not in this environment; pass --{option}")
        subprocess.run([python, __file__, "--measure", name, str(bits)], check=True)
    print_table(parts)


if __name__ == "__main__":
    main()
