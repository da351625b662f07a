"""Weights that are damaged, or another checkpoint's, under vectors that are whole."""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
from safetensors.torch import load_file
from torch import Tensor

from .cases import DAMAGED, EITHER, Case
from .folders import CONFIG, WEIGHTS, Folder

NAMED = f"{WEIGHTS}|/checkpoint"  # which tensor it is cannot be known: the file, or the folder
FIRST, LAST = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
EMBED = "model.embed_tokens.weight"
REPORT = "look at the above report"  # transformers has logged the tensors' names by then
UP = "model.layers.0.mlp.up_proj"


def _weights(
    family: str, what: str, change: Callable, right: str = DAMAGED, *names: str, **how
) -> Case:
    def run(folder: Folder) -> None:
        with folder.tensors(folder.weights) as tensors:
            change(tensors, folder)

    return Case(family, what, run, right, ("|".join((NAMED, *names)),), **how)


def _bit(name: str, position: int, bit: int = 0):
    """One bit of one value flipped."""

    def change(tensors: dict[str, Tensor], folder: Folder) -> None:
        tensors[name].view(-1).view(torch.uint8)[position] ^= 1 << bit

    return change


def _tensor(name: str, change: Callable[[Tensor], Tensor]):
    def changed(tensors: dict[str, Tensor], folder: Folder) -> None:
        tensors[name] = change(tensors[name].clone())

    return changed


def _of_other(which: str, *parts: str):
    """All tensors whose name has one of ``parts``, of another checkpoint."""

    def change(tensors: dict[str, Tensor], folder: Folder) -> None:
        theirs = load_file(folder.other(which))
        names = [name for name in tensors if any(part in name for part in parts)]
        assert any(not torch.equal(tensors[name], theirs[name]) for name in names)
        tensors.update({name: theirs[name] for name in names})

    return change


def _swap(first: str, second: str, but: str = "bias_compensation"):
    """All tensors of two modules swapped."""

    def change(tensors: dict[str, Tensor], folder: Folder) -> None:
        old = dict(tensors)
        for name in old:
            if name.startswith(first) and but not in name:
                other = second + name.removeprefix(first)
                tensors[name], tensors[other] = old[other], old[name]

    return change


def _column(name: str, channel: int):
    """An output channel of another's integers."""

    def change(tensors: dict[str, Tensor], folder: Folder) -> None:
        tensors[name][:, channel] = tensors[name][:, channel + 1]

    return change


PACKED = {
    "the first word of the first linear": _bit(f"{FIRST}.qweight", 0),
    "the last word of the last linear": _bit(f"{LAST}.qweight", -1, 7),
    "a word in the middle": _bit("model.layers.1.self_attn.o_proj.qweight", 4001, 5),
    "an output channel": _column(f"{LAST}.qweight", 77),
    "input channels swapped": _tensor(f"{FIRST}.qweight", lambda t: t.roll(1, 0)),
    "zeros": _tensor(f"{FIRST}.qweight", torch.zeros_like),
    "a scale, lowest bit": _bit(f"{FIRST}.scales", 0),
    "a scale, exponent": _bit(f"{LAST}.scales", 301, 4),
    "scales of groups reversed": _tensor(f"{FIRST}.scales", lambda t: t.flip(0)),
    "scales of channels rolled": _tensor(f"{LAST}.scales", lambda t: t.roll(1, 1)),
    "scales twice as large": _tensor(f"{LAST}.scales", lambda t: 2 * t),
    "scales that are NaN": _tensor(f"{LAST}.scales", lambda t: t * float("nan")),
    "a zero point, lowest bit": _bit(f"{FIRST}.qzeros", 0),
    "a zero point, last bits": _bit(f"{LAST}.qzeros", -1, 6),
    "zero points less one": _tensor(f"{FIRST}.qzeros", lambda t: t - 0x11111111),
    "g_idx reversed": _tensor(f"{FIRST}.g_idx", lambda t: t.flip(0)),
    "one of g_idx": _bit(f"{LAST}.g_idx", 4 * 40),
    "two blocks' integers swapped": _swap(UP, UP.replace("0", "1")),
    "two linears swapped": _swap(UP, "model.layers.0.mlp.gate_proj"),
    "two blocks swapped": _swap("model.layers.0", "model.layers.1"),
    "all of another calibration": _of_other("weights", ".qweight", ".scales", ".qzeros", ".g_idx"),
    "integers of another calibration": _of_other("weights", ".qweight"),
    "scales of another calibration": _of_other("weights", ".scales"),
    "a linear of another calibration": _of_other("weights", LAST),
    "a block of another calibration": _of_other("weights", "layers.1.self_attn", "layers.1.mlp"),
    "a linear of another model": _of_other("model", f"{FIRST}.q", f"{FIRST}.s"),
}
FLOAT = {
    "a linear, lowest bit": _bit(f"{FIRST}.weight", 0),
    "a linear, an output channel": _tensor(f"{LAST}.weight", lambda t: t.roll(1, 0)),
    "two linears swapped": _swap(UP, "model.layers.0.mlp.gate_proj"),
    "two blocks swapped": _swap("model.layers.0", "model.layers.1"),
    "a linear of another model": _of_other("model", f"{FIRST}.weight"),
    "a linear of the float model": _of_other("float", f"{LAST}.weight"),
}
NORM, BIAS = "model.layers.0.input_layernorm.weight", f"{FIRST}.bias"
OTHERS = {
    "a norm, lowest bit": _bit(NORM, 0),
    "a norm, twice as large": _tensor(NORM, lambda t: 2 * t),
    "a block's other norm": _bit("model.layers.1.post_attention_layernorm.weight", -1, 2),
    "two norms swapped": _swap("model.layers.0.input", "model.layers.1.input"),
    "the last norm": _bit("model.norm.weight", 2, 3),
    "an embedding, lowest bit": _bit(EMBED, 0),
    "embeddings of another model": _of_other("model", "embed_tokens"),
    "the head, lowest bit": _bit("lm_head.weight", 0),
    "the head of another model": _of_other("model", "lm_head"),
    "a bias, lowest bit": _bit(BIAS, 0),
    "a bias, negated": _tensor(BIAS, torch.neg),
    "biases of another model": _of_other("model", "_proj.bias"),
    "norms of another model": _of_other("model", "norm"),
}
TYPES = {
    "scales as float32": _tensor(f"{FIRST}.scales", lambda t: t.float()),
    "scales as bfloat16": _tensor(f"{FIRST}.scales", lambda t: t.bfloat16()),
    "a norm as float64": _tensor(NORM, lambda t: t.double()),
}
SHAPES = {
    "a linear with fewer channels": _tensor(f"{LAST}.qweight", lambda t: t[:, :-8]),
    "scales with fewer groups": _tensor(f"{LAST}.scales", lambda t: t[:-1]),
    "a norm with one value": _tensor(NORM, lambda t: t[:1]),
    "a linear is missing": lambda tensors, folder: tensors.pop(f"{LAST}.qweight"),
    "scales are missing": lambda tensors, folder: tensors.pop(f"{LAST}.scales"),
    "g_idx is missing": lambda tensors, folder: tensors.pop(f"{LAST}.g_idx"),
    "a norm is missing": lambda tensors, folder: tensors.pop(NORM),
    "a bias is missing": lambda tensors, folder: tensors.pop(BIAS),
    "embeddings are missing": lambda tensors, folder: tensors.pop(EMBED),
}


def _settings(what: str, path: tuple[str, ...], value) -> Case:
    """A setting of config.json that changes what the same weights compute."""

    def run(folder: Folder) -> None:
        config = json.loads(folder.config.read_text())
        place = config
        for name in path[:-1]:
            place = place[name]
        place[path[-1]] = value
        folder.config.write_text(json.dumps(config))

    return Case(
        "settings of the model",
        what,
        run,
        DAMAGED,
        (f"{NAMED}|{CONFIG}|{path[-1]}|{REPORT}",),
        anyone=True,
    )


BY_PACKED = [
    *(_weights("packed weights", what, change) for what, change in PACKED.items()),
    *(_weights("types of weights", what, change, EITHER) for what, change in TYPES.items()),
]
SHAPED = [
    _weights(
        "shapes of weights", what, change, DAMAGED, LAST, NORM, BIAS, EMBED, REPORT, anyone=True
    )
    for what, change in SHAPES.items()
]
BY_FLOAT = [_weights("float weights", what, change) for what, change in FLOAT.items()]
BESIDE = [_weights("other weights", what, change) for what, change in OTHERS.items()]
SETTINGS = [
    _settings("a block less", ("num_hidden_layers",), 1),
    _settings("a block more", ("num_hidden_layers",), 3),
    _settings("other heads", ("num_attention_heads",), 2),
]
GPTQ_SETTINGS = [
    _settings("other bits", ("quantization_config", "bits"), 8),
    _settings("another group size", ("quantization_config", "group_size"), 64),
    _settings("the older zero points", ("quantization_config", "format"), "gptq"),
]
