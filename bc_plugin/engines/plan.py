"""Which vector becomes the bias of which linear."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..errors import BiasCompensationError
from ..models.architectures import ARCHITECTURES, ENGINES, Architecture
from ..vectors.compensation import Compensation
from ..vectors.short_names import collapse
from .as_llama import Fused, parts_of


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


def architecture_for(config: Mapping[str, Any], engine: str) -> Architecture:
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
        if compensation.kinds[name] == "block":
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


def describe_left(plan: Plan, compensation: Compensation) -> str:
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
