"""The shapes of a model, from its config alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import BiasCompensationError
from ..models.blocks import find_blocks
from ..models.experts import is_routed, stacked_experts
from ..models.mixers import convolved_linears
from ..models.modules import linears_of
from ..refinement.weights import norms_of

TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "top_k_experts")


@dataclass(frozen=True)
class Linear:
    """A linear of a block, or experts of one shape.

    Attributes:
        inputs, outputs: Its features.
        closes: Whether it is the last of its part of the block, and so is given what that part
            has worked out, and gives to the residual stream; those before it share one input.
        count: Of experts in one tensor.
        share: Of the tokens, those that come to it; below 1 for routed experts.
        is_site: Whether it has vectors.
    """

    inputs: int
    outputs: int
    closes: bool
    count: int = 1
    share: float = 1.0
    is_site: bool = True

    @property
    def values(self) -> int:
        return self.inputs * self.outputs * self.count


@dataclass(frozen=True)
class Block:
    """A block.

    Attributes:
        linears: Its linears, in their order.
        others: Number of values of everything else: norms, biases, convolutions.
    """

    linears: tuple[Linear, ...]
    others: int

    @property
    def values(self) -> int:
        """Number of all linears' weights."""
        return sum(linear.values for linear in self.linears)

    @property
    def common_inputs(self) -> list[int]:
        """Features of each input that linears have in common; one that closes has its own."""
        shared = {linear.inputs for linear in self.linears if not linear.closes}
        return [*shared, *(linear.inputs for linear in self.linears if linear.closes)]


@dataclass(frozen=True)
class Shapes:
    """A model.

    Attributes:
        blocks: In their order.
        around: Number of values outside of the blocks: embeddings, head, the last norm.
        norms: Number of values of all norms' gains and biases.
        hidden: Features of the hidden states.
        attention: Features of all heads together.
        vocabulary: Number of logits per token.
        dtype: The type that the files are in, as the config says.
    """

    blocks: tuple[Block, ...]
    around: int
    norms: int
    hidden: int
    attention: int
    vocabulary: int
    dtype: torch.dtype


def shapes_of(name: str | Path) -> Shapes:
    """The shapes of a causal language model, whose weights need not be there.

    Args:
        name: A folder with a config.json, or a name on the hub.

    Raises:
        BiasCompensationError: transformers makes no such model of the config, or its blocks cannot
            be told.
    """
    model = _skeleton(name)
    blocks = find_blocks(model)
    config = model.config.get_text_config()
    inside = [_block(block, config) for block in blocks.modules(model)]
    total = sum(parameter.numel() for parameter in model.parameters())
    heads = getattr(config, "num_attention_heads", 1)
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Shapes(
        blocks=tuple(inside),
        around=total - sum(_values(block) for block in blocks.modules(model)),
        norms=sum(_values(norm) for norm in norms_of(model).values()),
        hidden=config.hidden_size,
        attention=heads * width,
        vocabulary=config.vocab_size,
        dtype=next(model.parameters()).dtype,
    )


def _skeleton(name: str | Path) -> Any:
    """The model without weights, on the meta device."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(name)
        dtype = getattr(config.get_text_config(), "dtype", None) or torch.float32
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.tie_weights()
    except Exception as error:  # transformers' are of all kinds
        raise BiasCompensationError(
            f"transformers makes no causal language model of the config of {name} "
            f"({type(error).__name__}: {' '.join(str(error).split())}); name a model that it loads."
        ) from error
    return model


def _values(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _block(block: nn.Module, config: Any) -> Block:
    linears = tuple(_linears(block, config))
    return Block(linears, _values(block) - sum(linear.values for linear in linears))


def _linears(block: nn.Module, config: Any) -> Iterator[Linear]:
    found = linears_of(block)
    last = {path.rpartition(".")[0]: path for path, _ in found}
    convolved = convolved_linears(block)
    routed = sum(is_routed(path) for path, _ in found)
    for path, module in found:
        rows, columns = module.weight.shape
        outputs, inputs = (rows, columns) if isinstance(module, nn.Linear) else (columns, rows)
        closes = last[path.rpartition(".")[0]] == path
        if is_routed(path):  # an expert has several linears, and a token some of the experts
            experts = routed // max(1, sum(p.startswith(_expert(path)) for p, _ in found))
            yield Linear(inputs, outputs, closes, 1, _share(config, experts), is_site=False)
        else:
            yield Linear(inputs, outputs, closes, is_site=path not in convolved)
    stacks = [weight for path, weight in stacked_experts(block) if weight.dim() == 3]
    for number, weight in enumerate(stacks, 1):
        experts, first, second = weight.shape
        share = _share(config, experts)
        yield Linear(second, first, number == len(stacks), experts, share, is_site=False)


def _expert(path: str) -> str:
    return path.rpartition(".")[0] + "."


def _share(config: Any, experts: int) -> float:
    chosen = next((getattr(config, name) for name in TOP_K if getattr(config, name, None)), experts)
    return min(1.0, chosen / experts)
