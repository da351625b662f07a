"""The model of a GGUF file as transformers reads it, dequantized and without its vectors."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import BiasCompensationError
from .compensated import said_in
from .file import GGUFFile
from .places import places_in

# Settings of a config, and what they are called in a file's metadata.
WIDTHS = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
}


def load_model(
    file: GGUFFile,
    dtype: torch.dtype = torch.float32,
    device_map: str = "cpu",
    config: Any = None,
) -> nn.Module:
    """A causal language model with the dequantized weights of a file.

    Args:
        dtype: In float32 the weights are exactly llama.cpp's.
        config: Of the float model, a ``PretrainedConfig``. Without one it is made of the file's
            metadata, of which transformers does not read everything: scaled rotary embeddings and
            some widths of heads are lost.

    Raises:
        BiasCompensationError: transformers does not read it, or the config is another model's.
    """
    from transformers import AutoModelForCausalLM

    given = {}
    if config is not None:
        _require_widths(file, config)
        given = {"config": copy.deepcopy(config)}
    try:
        model, loaded = AutoModelForCausalLM.from_pretrained(
            file.path.absolute().parent,
            gguf_file=file.path.name,
            dtype=dtype,
            device_map=device_map,
            output_loading_info=True,
            **given,
        )
    except Exception as error:  # of many kinds
        raise BiasCompensationError(
            f"{file.path}, of the architecture {file.architecture!r}, is not read by transformers "
            f"({type(error).__name__}: {' '.join(str(error).split())}). Where its config differs "
            "from what the metadata say, name the float model's folder, whose config is taken."
        ) from error
    if loaded["missing_keys"]:  # transformers would go on with random values
        raise BiasCompensationError(
            f"{file.path} has no tensors for {sorted(loaded['missing_keys'])} of the float model's "
            "config; name the float model that it was quantized from."
        )
    model.eval()
    # What is left are plain float weights.
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        vars(model).pop(name, None)
    vars(model.config).pop("quantization_config", None)
    _restore_biases(file, model)
    return model


def _require_widths(file: GGUFFile, config: Any) -> None:
    for name, key in WIDTHS.items():
        ours, theirs = file.setting(key), getattr(config, name, None)
        if None not in (ours, theirs) and ours != theirs:
            raise BiasCompensationError(
                f"{file.path} has {key}={ours}, and the float model {name}={theirs}: it is another "
                "model; name the one that the file was quantized from."
            )


@torch.no_grad()
def _restore_biases(file: GGUFFile, model: nn.Module) -> None:
    """Give biases that are sums with vectors their own values back; others are not read at all."""
    said = said_in(file)
    if said is None or not said.bases:
        return
    places = places_in(file)
    for site, name in places.biases.items():
        if name in said.bases:
            base = torch.tensor(np.array(places.read(name, said.bases[name])))
            model.get_submodule(site).bias.copy_(base)
