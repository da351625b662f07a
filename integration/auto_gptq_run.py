"""AutoGPTQ on SmolLM2-135M: quantize with the option, save, load in a new process, compare.

    python integration/auto_gptq_run.py [--blocks N]

in the legacy environment (``make benchmark-auto-gptq``). With ``--blocks`` only the first N blocks
of the model are kept: quicker, and enough to see that everything is in its place.
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

import real
import torch
from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig
from cpu_shims import auto_gptq_on_cpu
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

import bc_plugin
from bc_plugin import Compensation, Evaluation

BITS, GROUP_SIZE, SAMPLES, LENGTH, EVALUATED = 3, 64, 32, 512, 12


def _shortened(source: Path, blocks: int, folder: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model.model.layers = model.model.layers[:blocks]
    model.config.num_hidden_layers = blocks
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


@torch.no_grad()
def _logits(model, batch) -> torch.Tensor:
    return model(**batch).logits


def run(folder: Path, blocks: int | None = None) -> dict[str, Evaluation]:
    """Everything but the printing; raises if logits do not survive saving and loading."""
    source = real.smollm2()
    tokenizer = AutoTokenizer.from_pretrained(source)
    if blocks:
        source = _shortened(source, blocks, folder / "float")
    with auto_gptq_on_cpu():
        bc_plugin.enable("auto_gptq")
        config = BaseQuantizeConfig(
            bits=BITS, group_size=GROUP_SIZE, desc_act=False, sym=False, bias_compensation=True
        )
        gptq = AutoGPTQForCausalLM.from_pretrained(str(source), config, torch_dtype=torch.float32)
        gptq.quantize(real.calibration_windows(tokenizer, LENGTH, SAMPLES))
    gptq.save_quantized(str(folder / "out"), use_safetensors=True)
    batches = real.held_out_windows(tokenizer, LENGTH, EVALUATED)
    program = (
        "import sys, torch, bc_plugin; bc_plugin.enable('auto_gptq')\n"
        "from auto_gptq import AutoGPTQForCausalLM\n"
        "batch = torch.load(sys.argv[2])\n"
        "model = AutoGPTQForCausalLM.from_quantized(\n"
        "    sys.argv[1], device='cpu', torch_dtype=torch.float32).model\n"
        "with torch.no_grad(): torch.save(model(**batch).logits, sys.argv[3])"
    )
    files = [str(folder / name) for name in ("out", "batch.pt", "logits.pt")]
    torch.save(batches[0], files[1])
    subprocess.run([sys.executable, "-c", program, *files], check=True)
    torch.testing.assert_close(
        torch.load(files[2]), _logits(gptq.model, batches[0]), rtol=1e-3, atol=1e-3
    )
    reference = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    found = {"float": bc_plugin.evaluate(reference, batches)}
    found["GPTQ + BC"] = bc_plugin.evaluate(gptq.model, batches, reference)
    Compensation.attached_to(gptq.model).detach(gptq.model)
    found["GPTQ"] = bc_plugin.evaluate(gptq.model, batches, reference)
    return found


def gap_closed(found: dict[str, Evaluation]) -> float:
    """Share of the perplexity that quantization cost which compensation takes back."""
    plain, best = found["GPTQ"].perplexity, found["float"].perplexity
    return (plain - found["GPTQ + BC"].perplexity) / (plain - best)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int)
    blocks = parser.parse_args().blocks
    torch.manual_seed(0)
    folder = real.CACHE / "auto_gptq"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    found = run(folder, blocks)
    (folder / "found.json").write_text(json.dumps({k: v.to_dict() for k, v in found.items()}))
    table = Table("", "perplexity", "KL (nats)", "top-1 agreement")
    table.title = f"SmolLM2-135M, AutoGPTQ, {BITS} bits, group {GROUP_SIZE}, asymmetric"
    for name in ("float", "GPTQ", "GPTQ + BC"):
        row = found[name]
        kl = "" if row.kl is None else f"{row.kl:.3f}"
        top1 = "" if row.top1 is None else f"{row.top1:.1%}"
        table.add_row(name, f"{row.perplexity:.2f}", kl, top1)
    console = Console(width=100)
    console.print(table)
    console.print(f"gap closed: {gap_closed(found):.0%}; logits the same in a new process")


if __name__ == "__main__":
    main()
