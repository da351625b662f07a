"""llm-compressor on several ranks, run by ``torchrun``: what each of them ends up with.

    torchrun --nproc-per-node 2 llmcompressor_ranks.py SOURCE FOLDER

writes ``FOLDER/RANK.pt``, and a checkpoint for each case.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from compressed_tensors.offload import load_offloaded_model
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.core import reset_session
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM

from bc_plugin import BiasCompensationError, Compensation
from bc_plugin.llmcompressor import BiasCompensationModifier
from rig.subjects.tiny import logits, sequences, tiny_tokenizer

SHARES = slice(0, 5), slice(5, 8)
# The quantizer, the pipeline, the modifier's settings, and whether weights are loaded to be shared.
CASES: dict[str, tuple[type, str, dict[str, Any], bool]] = {
    "joint": (GPTQModifier, "sequential", {"positions": 1}, True),
    "not joint": (GPTQModifier, "basic", {"joint": False, "held_out": 0.4}, True),
    "scales": (QuantizationModifier, "independent", {"scales": True, "held_out": 0.4}, True),
    "native": (GPTQModifier, "independent", {"positions": 0, "native": True}, True),
    "refined": (QuantizationModifier, "independent", {"refine_steps": 2}, True),
    "not shared": (GPTQModifier, "basic", {}, False),
}


def compensated(case: str, source: str, folder: Path, share: slice = slice(None)) -> dict[str, Any]:
    """Quantize and compensate with a share of the sequences; save, and tell what came of it."""
    quantizer, pipeline, settings, offloaded = CASES[case]
    weights = {"num_bits": 4, "group_size": 32, "symmetric": True, "strategy": "group"}
    scheme = {"group_0": {"targets": ["Linear"], "weights": weights}}
    rows = [{key: value[0].tolist() for key, value in item.items()} for item in sequences()]
    try:
        model = oneshot(
            model=_load(source, offloaded),
            dataset=Dataset.from_list(rows[share]),
            tokenizer=tiny_tokenizer(),
            recipe=[
                quantizer(config_groups=scheme, ignore=["lm_head"]),
                BiasCompensationModifier(dtype="float32", **settings),
            ],
            pipeline=pipeline,
            shuffle_calibration_samples=False,
        )
    except BiasCompensationError as error:
        reset_session()
        return {"error": str(error)}
    found = Compensation.attached_to(model)
    model.save_pretrained(folder / case)
    return {
        "vectors": found.vectors,
        "errors": found.errors,
        "joint": found.joint,
        "digest": found.digest,
        "logits": logits(model),
    }


def _load(source: str, offloaded: bool):
    if not offloaded:
        return AutoModelForCausalLM.from_pretrained(source)
    with load_offloaded_model():
        # Without a limit it keeps 5 GB of shared memory free.
        memory = {"cpu": "1GB"}
        return AutoModelForCausalLM.from_pretrained(
            source, device_map="auto_offload", max_memory=memory
        )


def main() -> None:
    source, folder = sys.argv[1], Path(sys.argv[2])
    dist.init_process_group("gloo")
    rank = int(os.environ["RANK"])
    found = {case: compensated(case, source, folder, SHARES[rank]) for case in CASES}
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
