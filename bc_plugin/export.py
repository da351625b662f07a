"""Compensated checkpoints as ordinary ones: the vectors merged into biases."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from .engines.as_llama import FUSED, Fused, llama_config, parts_of, unfuse
from .engines.dequantize import dequantize
from .engines.widen import needs_widening, widen
from .errors import BiasCompensationError
from .files import new_folder
from .models.architectures import ALWAYS, ARCHITECTURES, ENGINES, Architecture
from .names import KEY, SUFFIX, collapse
from .vectors.compensation import Compensation

CONFIGS = ("config.json", "quantize_config.json")
TOKENS = 48
# A fresh process, in which nothing of this package is imported.
LOADED_ALONE = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], device_map=sys.argv[2]).eval()
with torch.no_grad():
    ids = torch.load(sys.argv[3]).to(next(model.parameters()).device)
    torch.save(model(input_ids=ids).logits.float().cpu(), sys.argv[4])
"""


@dataclass
class Plan:
    """Where the vectors go.

    Attributes:
        biases: By linear, what is added to its bias, float64 (out_features,).
        carried: Names of the sites whose vectors these are.
        left: Sites whose vectors the engine cannot be given, and why.
    """

    biases: dict[str, Tensor] = field(default_factory=dict)
    carried: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)


def export(
    compensated: str | Path,
    out: str | Path,
    *,
    engine: str = "transformers",
    allow_partial: bool = False,
    as_llama: bool = False,
    device_map: str = "cpu",
) -> Path:
    """Write a standard checkpoint whose biases hold the compensation, and load it to compare.

    Args:
        compensated: Folder of a compensated checkpoint with ``positions=0``.
        out: Folder to write; it must not exist.
        engine: Who is to load it: ``"transformers"``, ``"vllm"`` or ``"llama.cpp"``. For vLLM, GPTQ
            weights of 2 and 3 bits are stored with 4, unchanged in value; for llama.cpp, which has
            quantized formats of its own, packed weights become floats.
        allow_partial: Leave out vectors that the engine cannot be given, rather than refuse.
        as_llama: Rewrite a model that is exactly a Llama with biases as one.
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
    if compensation.positions != 0:
        raise BiasCompensationError(
            f"{compensated} has a vector of its own for {compensation.positions} leading "
            "positions, which no plain bias can hold. Make one with `bc-plugin compensate "
            f"{compensated} FLOAT NEW --dataset TEXT --positions 0`, or quantize with "
            "`bc-plugin quantize ... --positions 0`."
        )
    config = json.loads((compensated / "config.json").read_text(encoding="utf-8"))
    fused: Fused = {}
    if as_llama:
        fused = FUSED[config["model_type"]](config) if config.get("model_type") in FUSED else {}
        config = llama_config(config)
    architecture = _architecture(config, engine)
    plan = make_plan(compensation, architecture, config, engine, fused)
    if plan.left and not allow_partial:
        raise BiasCompensationError(
            f"{engine} cannot be given all vectors of this model:\n"
            f"{_describe(plan, compensation)}\n"
            "Pass allow_partial=True (--allow-partial) to leave them out, load the checkpoint "
            "with the plugin, or see whether --as-llama fits."
        )
    tensors = read_tensors(compensated)
    unfuse(tensors, fused, compensation.blocks[0])
    _set_biases(tensors, plan, architecture, config, compensation)
    settings = config.get("quantization_config")
    if settings is not None:
        settings.pop(KEY, None)
        if engine == "vllm" and needs_widening(settings):
            widen(tensors, settings)
        elif engine == "llama.cpp":
            dequantize(tensors, config.pop("quantization_config"), _dtype(config))
    with new_folder(Path(out)) as part:
        write_checkpoint(part, compensated, tensors, config)
        del tensors
        _verify(compensated, part, compensation, plan, device_map)
    return Path(out)


def _architecture(config: Mapping[str, Any], engine: str) -> Architecture:
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise BiasCompensationError(
            f"which biases a model of type {kind!r} may have is not known here; known are "
            f"{sorted(ARCHITECTURES)}. Load it with the plugin instead."
        )
    architecture = ARCHITECTURES[kind]
    if engine not in architecture.engines:
        able = [name for name in ENGINES if name in architecture.engines]
        raise BiasCompensationError(
            f"whether {engine} reads the biases of a model of type {kind!r} is not known here; "
            f"it can be exported for {able}."
        )
    return architecture


def make_plan(
    compensation: Compensation,
    architecture: Architecture,
    config: Mapping[str, Any],
    engine: str,
    fused: Fused | None = None,
) -> Plan:
    """Decide for every site whether its vector can become a bias, and of which linear.

    Args:
        fused: Linears that the exported checkpoint has in parts.
    """
    plan = Plan()
    (path,) = compensation.blocks  # no architecture known here has several lists of blocks
    read = architecture.engines[engine]
    factor = architecture.factor(config)
    for name, vectors in compensation.vectors.items():
        vector = vectors[0].double()
        if compensation.errors[name].kind == "block":
            if architecture.last is None or factor is None:
                plan.left[name] = "no bias stands for the output of a block"
                continue
            block, found = name, {architecture.last: vector / factor}
        else:
            index, _, linear = name.removeprefix(f"{path}.").partition(".")
            block, found = f"{path}.{index}", parts_of(linear, vector, fused or {})
        if not set(found) <= set(architecture.linears):
            plan.left[name] = "the architecture has no bias there"
        elif not set(found) <= set(read):
            plan.left[name] = f"{engine} ignores a bias there"
        else:
            for linear, part in found.items():
                target = f"{block}.{linear}"
                plan.biases[target] = plan.biases.get(target, 0) + part
            plan.carried.append(name)
    return plan


def _describe(plan: Plan, compensation: Compensation) -> str:
    """What is left out, with its share of the error that the vectors take away."""
    gain = {
        row["site"]: max(row["before"] - row["after"], 0.0) * row["shape"][-1]
        for row in compensation.describe()
    }
    total = sum(gain.values()) or 1.0
    lines = []
    for short, names in collapse(plan.left).items():
        share = sum(gain[name] for name in names) / total
        lines.append(f"  {short}: {share:.1%} of the error taken away; {plan.left[names[0]]}")
    return "\n".join(lines)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint but the vectors."""
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise BiasCompensationError(
            f"{folder} holds no model.safetensors, nor shards of one. Save it as safetensors; a "
            "file that AutoGPTQ named otherwise has to be renamed to that, as for transformers."
        )
    tensors = {}
    for path in files:
        with safe_open(path, "pt") as file:
            tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return {key: tensor for key, tensor in tensors.items() if not key.endswith(SUFFIX)}


def _dtype(config: Mapping[str, Any]) -> torch.dtype:
    return getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or "float32"))


def _set_biases(
    tensors: dict[str, Tensor],
    plan: Plan,
    architecture: Architecture,
    config: dict[str, Any],
    compensation: Compensation,
) -> None:
    """Put the biases in place, and zeros where a flag makes an engine expect one."""
    dtype = _dtype(config)
    prefix = f"{compensation.blocks[0]}."
    inside = [key.removeprefix(prefix) for key in tensors if key.startswith(prefix)]
    blocks = sorted({key.partition(".")[0] for key in inside})
    for flag, linears in architecture.flags.items():
        names = [f"{prefix}{block}.{linear}" for block in blocks for linear in linears]
        present = {name: tensors.get(f"{name}.bias") for name in names}
        in_use = any(name in plan.biases for name in names) or any(
            bias is not None and bool(bias.any()) for bias in present.values()
        )
        if not in_use:
            continue
        if flag != ALWAYS:
            config[flag] = True
        for name, bias in present.items():
            width = _width(tensors, name, compensation)
            base = torch.zeros(width, dtype=torch.float64) if bias is None else bias.double()
            whole = (base + plan.biases.get(name, 0)).to(dtype if bias is None else bias.dtype)
            if not bool(torch.isfinite(whole).all()):
                raise BiasCompensationError(
                    f"the bias of {name} does not fit into {whole.dtype}; export a checkpoint "
                    "in bfloat16 or float32."
                )
            tensors[f"{name}.bias"] = whole


def _width(tensors: Mapping[str, Tensor], name: str, compensation: Compensation) -> int:
    """out_features of a linear, from its vector or from whatever else is stored of it."""
    if name in compensation.vectors:
        return compensation.vectors[name].shape[-1]
    for leaf, axis in (("scales", -1), ("bias", 0), ("weight", 0)):
        if f"{name}.{leaf}" in tensors:
            return tensors[f"{name}.{leaf}"].shape[axis]
    raise BiasCompensationError(f"the checkpoint has no {name}, which its architecture announces.")


def write_checkpoint(
    folder: Path, source: Path, tensors: dict[str, Tensor], config: dict[str, Any]
) -> None:
    """Write ``tensors`` and ``config``, and whatever else the folder ``source`` holds."""
    from huggingface_hub import save_torch_state_dict

    save_torch_state_dict(tensors, folder, metadata={"format": "pt"})
    for file in source.iterdir():
        weights = file.suffix in (".safetensors", ".bin") or file.name.endswith(".index.json")
        if file.is_file() and not weights and file.name not in CONFIGS:
            shutil.copy2(file, folder / file.name)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    own = source / "quantize_config.json"
    if own.is_file() and "quantization_config" in config:
        settings = json.loads(own.read_text(encoding="utf-8"))
        settings.pop(KEY, None)
        widened = config["quantization_config"]
        settings |= {name: widened[name] for name in settings if name in widened}
        (folder / own.name).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def _verify(source: Path, exported: Path, whole: Compensation, plan: Plan, device_map: str) -> None:
    """Compare with the plugin, in logits of arbitrary tokens."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, device_map=device_map).eval()
    attached = Compensation.attached_to(model)  # where the patches are enabled
    if attached is not None:
        attached.detach(model)
    whole.check(model)
    carried = Compensation(
        {name: whole.vectors[name] for name in plan.carried},
        {name: whole.errors[name] for name in plan.carried},
        whole.positions,
        whole.blocks,
        whole.digest,
    )
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, TOKENS), generator=generator)
    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
    carried.attach_unchecked(model)
    expected = model(input_ids=ids.to(device)).logits.float().cpu()
    carried.detach(model)
    plain = model(input_ids=ids.to(device)).logits.float().cpu()
    del model
    with tempfile.TemporaryDirectory() as folder:
        files = [str(Path(folder) / name) for name in ("ids.pt", "logits.pt")]
        torch.save(ids, files[0])
        command = [sys.executable, "-c", LOADED_ALONE, str(exported), device_map, *files]
        process = subprocess.run(command, capture_output=True, text=True)
        if process.returncode:
            raise BiasCompensationError(
                "what was exported cannot be loaded, and has been deleted:\n"
                + process.stderr[-2000:]
            )
        found = torch.load(files[1])
    apart, effect = (found - expected).norm(), (plain - expected).norm()
    # Widened weights run on another kernel, which may round inputs to half precision.
    rounding = 4 * torch.finfo(dtype).eps * expected.norm()
    if not apart <= torch.maximum(0.25 * effect, rounding):
        raise BiasCompensationError(
            f"what was exported gives other logits than the plugin and has been deleted: they are "
            f"{apart:.3g} apart, where compensation moves them by {effect:.3g}. Please report this."
        )
