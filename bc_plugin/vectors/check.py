"""Whether vectors belong to a model: shapes, and the quantized weights."""

from __future__ import annotations

from itertools import zip_longest

import torch
from torch import nn

from ..errors import BiasCompensationError
from ..models.blocks import find_block_lists
from ..models.modules import stored_tensors
from ..names import KEY
from .contents import Contents
from .weights import same_floats, weights_of


def check(compensation: Contents, model: nn.Module) -> None:
    """See ``Compensation.check``."""
    modules = dict(model.named_modules())
    for name, vectors in compensation.vectors.items():
        if name not in modules:
            raise BiasCompensationError(
                f"there is no module {name!r} in {type(model).__name__}; "
                "these vectors belong to another model."
            )
        convolution = compensation.kinds[name] == "convolution"
        rows = len(vectors) if convolution else compensation.positions + 1
        widths = _widths(modules[name], "out_channels" if convolution else "out_features")
        if vectors.dim() != 2 or len(vectors) != rows or vectors.shape[1] not in widths:
            shapes = " or ".join(str((rows, width)) for width in sorted(widths))
            raise BiasCompensationError(
                f"{name}.{KEY} has shape {tuple(vectors.shape)}, expected {shapes}; "
                "these vectors belong to another model or to other positions."
            )
        if not bool(torch.isfinite(vectors).all()):
            raise BiasCompensationError(
                f"{name}.{KEY} holds NaN or infinity; the file is damaged, compute the "
                "compensation again."
            )
    _check_weights(compensation, model)


def _check_weights(compensation: Contents, model: nn.Module) -> None:
    lists = [blocks.path for blocks in find_block_lists(model, compensation.blocks)]
    found = weights_of(model, lists, compensation.vectors)
    if found.digest != compensation.digest:
        raise BiasCompensationError(
            f"the vectors were computed for quantized weights with digest {compensation.digest}; "
            f"this model's weights have {found.digest}. Load the checkpoint they were saved with, "
            "or compute them again with bc_plugin.compensate. (Some kernels repack their weights "
            "when first run: attach before running the model.)"
        )
    blocks = zip_longest(compensation.float_weights, found.float_weights, fillvalue="")
    for number, (expected, own) in enumerate(blocks):
        if not same_floats(expected, own):
            raise BiasCompensationError(
                f"the vectors were computed for a model whose block {number} has other scales, "
                "norms or biases than this one's, with the same integers. Load the checkpoint they "
                "were saved with, or compute them again with bc_plugin.compensate."
            )


def _widths(module: nn.Module, attribute: str) -> set[int]:
    """How many features a site may give; a block, those of anything within."""
    own = getattr(module, attribute, None)
    if own is not None:
        return {own}
    found = {getattr(child, attribute, 0) for child in module.modules()}
    return (found | {tensor.shape[-1] for _, tensor in stored_tensors(module) if tensor.dim()}) - {
        0
    }
