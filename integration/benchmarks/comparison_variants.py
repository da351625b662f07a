"""What the comparison has in its table, from the float model to what is refined longest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import comparison_peers as peers
from comparison_part import GROUP_SIZE, SAMPLES, STEPS, Part
from rig.quantizers.with_compressed_tensors import round_to_nearest

from bc_plugin.calibration.sample import sample_from

EVERYTHING = ("vectors", "scales", "norms")


@dataclass(frozen=True)
class Variant:
    """A row.

    Attributes:
        make: Measures it, under this name.
        start: The variant that it goes on from, whose seconds count as well.
    """

    label: str
    make: Callable[[Part, str], None]
    start: str = ""


def _float(part: Part, variant: str) -> None:
    part.measure(variant, part.reference, 0.0)


def _plain(part: Part, variant: str) -> None:
    part.quantized(variant)
    part.measure(variant, part.load(variant), 0.0)


def _nearest(part: Part, variant: str) -> None:
    settings = {"symmetric": False, "bits": part.bits, "group_size": GROUP_SIZE}
    part.made(variant, lambda folder: round_to_nearest(part.source, folder, **settings))
    part.measure(variant, part.load(variant), 0.0)


def _joint(positions: int) -> Callable[[Part, str], None]:
    def make(part: Part, variant: str) -> None:
        seconds = part.quantized(variant, {"positions": positions})
        part.measure(variant, part.load(variant), seconds - part.quantized("gptq"))

    return make


def _compensated(start: str, **config) -> Variant:
    label = "+ BC" + "".join(f", {key}={value!r}" for key, value in config.items())
    return Variant(label, lambda part, name: part.compensated(name, start, config), start)


def _of_its_own(part: Part, variant: str) -> None:
    own = sample_from(part.reference, part.tokenizer, part.more[0]["input_ids"].shape[-1], SAMPLES)
    part.compensated(variant, "gptq", {"positions": 1}, own)


def _refined(start: str, label: str = "", **settings) -> Variant:
    train = settings.get("train", EVERYTHING)
    settings = {**settings, "train": train}
    what = "all" if train == EVERYTHING else ", ".join(train)
    label = label or f"  refined: {what}"
    return Variant(label, lambda part, name: part.refined(name, start, settings), start)


VARIANTS = {
    "float": Variant("float32", _float),
    "gptq": Variant("GPTQ", _plain),
    "linear": Variant(
        "+ bias correction per linear (DFQ's closed form)",
        lambda part, name: part.compensated(name, "gptq", {"positions": 0, "sites": ["linear"]}),
        "gptq",
    ),
    "all": Variant(
        '+ BC, positions="all" (the paper\'s setting)',
        lambda part, name: part.compensated(name, "gptq", {"positions": "all", "max_tokens": None}),
        "gptq",
    ),
    "bc-0": _compensated("gptq", positions=0),
    "bc-1": _compensated("gptq", positions=1),
    "own-text": Variant("+ BC, positions=1, on text of its own", _of_its_own, "gptq"),
    "bc-0-scales": _compensated("gptq", positions=0, scales=True),
    "bc-1-scales": _compensated("gptq", positions=1, scales=True),
    "bc-0-integers": _compensated("gptq", positions=0, integers=True),
    "bc-1-integers": _compensated("gptq", positions=1, integers=True),
    "nearest": Variant("round to nearest (compressed-tensors)", _nearest),
    "nearest-1": _compensated("nearest", positions=1),
    "nearest-1-integers": _compensated("nearest", positions=1, integers=True),
    "norm": Variant(f"+ norm tuning, {STEPS} steps (gptqmodel 7.7)", peers.norm, "gptq"),
    "eora": Variant(f"+ EoRA, rank {peers.RANK} (gptqmodel)", peers.eora, "gptq"),
    "gptaq": Variant("GPTAQ (gptqmodel)", peers.gptaq),
    "joint-0": Variant("joint, positions=0", _joint(0)),
    "joint-1": Variant("joint, positions=1", _joint(1)),
    "joint-0-scales": Variant(
        "joint, positions=0, scales=True",
        lambda part, name: part.compensated(name, "joint-0", {"positions": 0, "scales": True}),
        "joint-0",
    ),
    "joint-1-scales": Variant(
        "joint, positions=1, scales=True",
        lambda part, name: part.compensated(name, "joint-1", {"positions": 1, "scales": True}),
        "joint-1",
    ),
    "block-1": _refined("joint-1", "  refined by block", by="block", steps=16, train=("vectors",)),
    "joint-0-vectors": _refined("joint-0", train=("vectors",)),
    "joint-1-vectors": _refined("joint-1", train=("vectors",)),
    "vectors-0": _refined("joint-0-scales", train=("vectors",)),
    "scales-0": _refined("joint-0-scales", train=("scales",)),
    "norms-0": _refined("joint-0-scales", train=("norms",)),
    "refined-0": _refined("joint-0-scales"),
    "refined-1": _refined("joint-1-scales"),
    "longer-0": _refined("joint-0-scales", f"  refined: all, {4 * STEPS} steps", steps=4 * STEPS),
    "autoround": Variant("AutoRound (its defaults)", peers.auto_round),
    "autoround-scales": _compensated("autoround", positions=0, scales=True),
    "autoround-refined": _refined("autoround-scales"),
}
