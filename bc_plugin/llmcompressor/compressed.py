"""A model's weights as its checkpoint has them: vectors belong to integers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from compressed_tensors import ModelCompressor
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationStatus
from compressed_tensors.utils import get_direct_state_dict, replace_direct_state_dict
from torch import Tensor, nn

Stored = dict[str, Tensor]


@contextmanager
def compressed(model: nn.Module) -> Iterator[None]:
    """Compress the weights of a model, in place.

    While it lasts, running parts of the model leaves them so; afterwards, running the model
    decompresses them for good, as it does after llm-compressor's own ``save_pretrained``.
    """
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.remove_decompression_hook(model)  # whoever compresses adds one more
    compressor.compress_model(model, skip_compressed=True)
    compressor.remove_decompression_hook(model)
    try:
        yield
    finally:
        compressor.remove_decompression_hook(model)
        compressor.add_decompress_hook(model)


class Integers:
    """The compressed weights of a model, kept for when running it has decompressed them.

    Compressed once more, weights of half precision are not always the same integers. So long as the
    model is compressed this takes no memory of its own.
    """

    def __init__(self, model: nn.Module) -> None:
        self.stored = [
            (module, {k: v for k, v in get_direct_state_dict(module).items() if k != "bias"})
            for module in model.modules()
            if getattr(module, "quantization_status", None) == QuantizationStatus.COMPRESSED
        ]

    def restore(self) -> None:
        """Give them back to every module whose weight is still what they mean."""
        for module, stored in self.stored:
            if module.quantization_status != QuantizationStatus.DECOMPRESSED:
                continue
            scheme = module.quantization_scheme
            compressor = BaseCompressor.get_value_from_registry(scheme.format.value)
            meant = compressor.decompress(dict(stored), scheme)
            own = get_direct_state_dict(module)
            if all(torch.equal(own[name], value) for name, value in meant.items()):
                others = {name: value for name, value in own.items() if name not in meant}
                replace_direct_state_dict(module, others | stored)
                module.quantization_status = QuantizationStatus.COMPRESSED
