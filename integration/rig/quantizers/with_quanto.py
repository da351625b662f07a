"""optimum-quanto, by way of its own files.

Not by its ``QuantizedTransformersModel``: transformers 5 saves a vision transformer under other
names than its modules have, and that loader drops what it does not know and says nothing.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import optimum.quanto as quanto
import torch
from optimum.quanto import Calibration, freeze, qint4, qint8, quantization_map, requantize
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

# Narrower activations are an error: "QBytesTensor can only be of 8-bit qtype".
WEIGHTS, ACTIVATIONS = {4: qint4, 8: qint8}, {8: qint8}
TENSORS, MAP = "model.safetensors", "quanto_qmap.json"


@torch.no_grad()
def quantize(
    model: nn.Module,
    bits: tuple[int, int],
    calibration: Iterable[Mapping[str, Tensor]],
    keep: Sequence[str],
    folder: Path,
) -> nn.Module:
    """A copy of ``model``, quantized, calibrated, saved to ``folder`` and loaded from there.

    Loaded, for its loader quantizes more outputs than its quantizer does, and vectors are only
    good for the model they were computed for.

    Args:
        bits: Of weights and of activations.
        keep: Patterns of the names of what stays float.
    """
    quantized = copy.deepcopy(model)
    quanto.quantize(
        quantized, weights=WEIGHTS[bits[0]], activations=ACTIVATIONS[bits[1]], exclude=list(keep)
    )
    with Calibration():
        for inputs in calibration:
            quantized(**inputs)
    freeze(quantized)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(quantized.state_dict(), folder / TENSORS)
    (folder / MAP).write_text(json.dumps(quantization_map(quantized)))
    return load(model, folder)


def load(model: nn.Module, folder: Path) -> nn.Module:
    """What ``quantize`` saved, in a copy of ``model``; vectors are loaded after it."""
    quantized = copy.deepcopy(model)
    requantize(quantized, load_file(folder / TENSORS), json.loads((folder / MAP).read_text()))
    return quantized
