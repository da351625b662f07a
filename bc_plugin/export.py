"""Compensated checkpoints for engines: ordinary ones, with the vectors merged into biases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .engines.as_llama import FUSED, Fused, llama_config, unfuse
from .engines.dequantize import dequantize
from .engines.keep import write_kept
from .engines.plain import dtype_in, read_tensors, set_biases, write_checkpoint
from .engines.plan import architecture_for, describe_left, make_plan
from .engines.verify import require_own_weights, verify_kept, verify_plain
from .engines.widen import needs_widening, widen
from .errors import BiasCompensationError
from .files import new_folder
from .models.architectures import ARCHITECTURES, ENGINES
from .names import KEY
from .vectors.compensation import Compensation
from .vectors.lazy import LazyTensor
from .vectors.sealed import unseal


def export(
    compensated: str | Path,
    out: str | Path,
    *,
    engine: str = "transformers",
    allow_partial: bool = False,
    as_llama: bool = False,
    verify: bool = True,
    device_map: str = "cpu",
) -> Path:
    """Write a checkpoint for an engine, with biases that hold the vectors, and load it to compare.

    Args:
        compensated: Folder of a compensated checkpoint; with ``positions=0``, but for vLLM.
        out: Folder to write; it must not exist.
        engine: Who is to load it: ``"transformers"``, ``"vllm"`` or ``"llama.cpp"``. For vLLM, GPTQ
            weights of 2 and 3 bits are stored with 4, unchanged in value, and where any vector
            can be no bias, all of them stay vectors, which vLLM is given by this plugin; for
            llama.cpp, which has quantized formats of its own, packed weights become floats.
        allow_partial: Leave out vectors that can be no biases of the engine's, rather than refuse
            or keep them.
        as_llama: Rewrite a model that is exactly a Llama with biases as one.
        verify: Load the source, and the result in a fresh process, and compare their logits.
            Otherwise no model is ever in memory, and of the source only the digest of its files is
            checked.
        device_map: Where transformers loads the two models that are compared.

    Returns:
        ``out``.

    Raises:
        BiasCompensationError: there is more than one vector per site; the architecture or the
            engine cannot carry all of them; a fresh process gets other logits from the result
            than the plugin gives.
    """
    compensated = Path(compensated)
    if engine not in ENGINES:
        raise BiasCompensationError(f"engine {engine!r} is unknown; known are {list(ENGINES)}.")
    compensation = Compensation.load(compensated)
    if not verify:
        require_own_weights(compensated)
    config = json.loads((compensated / "config.json").read_text(encoding="utf-8"))
    if engine == "vllm" and _kept(compensation, config, allow_partial or as_llama):
        return _keep(compensated, Path(out), config, compensation, verify, device_map)
    _require_one_vector(compensation, compensated)
    fused: Fused = {}
    if as_llama:
        fused = FUSED[config["model_type"]](config) if config.get("model_type") in FUSED else {}
        config = llama_config(config)
    architecture = architecture_for(config, engine)
    plan = make_plan(compensation, architecture, config, engine, fused)
    if plan.left and not allow_partial:
        raise BiasCompensationError(
            f"{engine} cannot be given all vectors of this model:\n"
            f"{describe_left(plan, compensation)}\n"
            "Pass allow_partial=True (--allow-partial) to leave them out, load the checkpoint "
            "with the plugin, or see whether --as-llama fits."
        )
    tensors = read_tensors(compensated)
    unfuse(tensors, fused, compensation.blocks[0])
    set_biases(tensors, plan, architecture, config, compensation)
    _repack(tensors, config, engine)
    with new_folder(Path(out)) as part:
        write_checkpoint(part, compensated, tensors, config)
        if verify:
            verify_plain(compensated, part, compensation, plan, device_map)
    return Path(out)


def _kept(compensation: Compensation, config: dict[str, Any], plain: bool) -> bool:
    """Whether some vectors can be no biases in vLLM, which can be given them by the plugin.

    Args:
        plain: Whether the caller wants biases all the same.
    """
    if plain or "quantization_config" not in config:  # vLLM would not ask whose it is
        return False
    architecture = ARCHITECTURES.get(config.get("model_type", ""))
    if compensation.positions or architecture is None or "vllm" not in architecture.engines:
        return True
    return bool(make_plan(compensation, architecture, config, "vllm").left)


def _keep(
    source: Path,
    out: Path,
    config: dict[str, Any],
    compensation: Compensation,
    verify: bool,
    device_map: str,
) -> Path:
    """Write the same checkpoint in a width that vLLM has kernels for, vectors included."""
    tensors = read_tensors(source)
    _repack(tensors, config, "vllm")
    with new_folder(out) as part:
        write_kept(part, source, tensors, config, compensation)
        if verify:
            verify_kept(source, part, compensation, device_map)
    return out


def _require_one_vector(compensation: Compensation, folder: Path) -> None:
    if compensation.positions != 0:
        raise BiasCompensationError(
            f"{folder} has a vector of its own for {compensation.positions} leading "
            "positions, which no plain bias can hold. Make one with `bc-plugin compensate "
            f"{folder} FLOAT NEW --dataset TEXT --positions 0`, or quantize with "
            "`bc-plugin quantize ... --positions 0`."
        )


def _repack(tensors: dict[str, LazyTensor], config: dict[str, Any], engine: str) -> None:
    """Store packed weights as the engine has kernels for them."""
    config.pop(KEY, None)
    settings = config.get("quantization_config")
    if settings is None:
        return
    settings = config["quantization_config"] = unseal(settings)
    settings.pop(KEY, None)
    if engine == "vllm" and needs_widening(settings):
        widen(tensors, settings)
    elif engine == "llama.cpp":
        dequantize(tensors, config.pop("quantization_config"), dtype_in(config))
