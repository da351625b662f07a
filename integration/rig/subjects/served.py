"""Tiny compensated checkpoints for engines, with vectors so large that a wrong row is seen."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import bc_plugin
from bc_plugin.toolkits.copy import copy_compensated
from rig.quantizers.pipelines import PIPELINES
from rig.quantizers.rounded import round_to_gptq
from rig.quantizers.with_compressed_tensors import round_to_nearest

from .tiny import log_probabilities, sequences, tiny_checkpoint, tiny_tokenizer

LONGEST = 1024


def _awq(source: Path, folder: Path) -> None:
    pipeline = PIPELINES["gptqmodel-awq"]
    settings = {"bits": 4, "group_size": 32, **pipeline.settings}
    bc_plugin.enable()
    try:
        pipeline.save(pipeline.quantize(str(source), sequences(), None, settings), folder)
    finally:
        bc_plugin.disable()


METHODS = {
    "gptq": round_to_gptq,
    "awq": _awq,
    "compressed-tensors": lambda source, folder: round_to_nearest(str(source), folder),
}


def served_checkpoint(
    folder: Path,
    architecture: str,
    positions: int,
    method: str = "gptq",
    factor: float = 1.0,
    **changes: int,
) -> tuple[Path, Path]:
    """Write a tiny model of 4-bit weights, with and without vectors.

    Args:
        method: One of ``METHODS``.
        factor: How large they are made; kernels that round more need larger ones.
        changes: Of the model's shape.

    Returns:
        The folder with vectors, and the one without.
    """
    source, plain, out = folder / "float", folder / "without", folder / "with"
    source.mkdir(parents=True)
    tiny_checkpoint(source, architecture, torch.bfloat16, longest=LONGEST, **changes)
    tiny_tokenizer().save_pretrained(source)
    METHODS[method](source, plain)
    tiny_tokenizer().save_pretrained(plain)
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.bfloat16).eval()
    float_model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).eval()
    settings = {"positions": positions, "held_out": 0}
    compensation = bc_plugin.compensate(model, float_model, sequences(), settings)
    for vectors in compensation.vectors.values():
        size = factor * vectors.float().abs().mean()
        vectors += (size * torch.randn(vectors.shape)).to(vectors.dtype)
        vectors[:-1] += (2 * size * torch.randn(vectors[:-1].shape)).to(vectors.dtype)
    out.mkdir()
    copy_compensated(plain, out, compensation, model)
    return out, plain


def scores_of(folder: Path, prompts: list[list[int]]) -> list[torch.Tensor]:
    """What transformers, with the plugin where there are vectors, gives each prompt's tokens."""
    bc_plugin.enable()
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    finally:
        bc_plugin.disable()
    return [log_probabilities(model, torch.tensor([ids]))[0] for ids in prompts]
