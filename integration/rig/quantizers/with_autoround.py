"""AutoRound, and compensation afterwards: it has no option for that."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch

import bc_plugin


def round_and_save(source, calibration, folder, settings):
    """Write what AutoRound makes of ``source``.

    Args:
        settings: ``bits``, ``group_size`` and ``sym`` are its scheme's, ``format`` is that of the
            files, and the rest AutoRound's own.
    """
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    scheme = {name: settings[name] for name in ("bits", "group_size", "sym")}
    written = settings.get("format", "auto_round")
    own = {k: v for k, v in settings.items() if k not in (*scheme, "format")}
    rounding = AutoRound(
        AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32),
        AutoTokenizer.from_pretrained(source),
        scheme={**scheme, "data_type": "int"},
        dataset=[item["input_ids"] for item in calibration],
        seqlen=calibration[0]["input_ids"].shape[1],
        nsamples=len(calibration),
        device_map="cpu",
        **own,
    )
    with tempfile.TemporaryDirectory() as scratch:
        rounding.quantize_and_save(scratch, format=written)
        (config,) = Path(scratch).rglob("config.json")  # in a folder that it names by the scheme
        shutil.copytree(config.parent, folder)


def quantize(source, calibration, flag, settings):
    """Round, load, compensate, and refine if that is asked for."""
    from transformers import AutoModelForCausalLM

    config = bc_plugin.BiasCompensationConfig.parse(flag)
    with tempfile.TemporaryDirectory() as folder:
        rounded = Path(folder, "rounded")
        round_and_save(source, calibration, rounded, settings)
        model = load(rounded)
    if config is None:
        return model
    reference = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    bc_plugin.compensate(model, reference, calibration, config).attach(model)
    if config.refine_steps:
        steps = bc_plugin.RefinementConfig(steps=config.refine_steps, by=config.refine)
        refined = bc_plugin.refine(model, reference, calibration, steps)
        bc_plugin.Compensation.attached_to(model).detach(model)
        refined.attach(model)
    return model


def save(model, folder):
    model.save_pretrained(folder)


def load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
