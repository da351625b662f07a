"""Routed experts: parts of a block that see only the tokens a router sends them.

Which tokens these are differs between the float model and the quantized one, so the outputs of one
expert cannot be compared, and no vector of its own would be right.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .modules import is_linear

EXPERTS = "experts"  # in all of transformers; what sees every token is called ``shared_experts``


def is_routed(path: str) -> bool:
    """Whether the module or tensor at ``path``, in a block or a model, belongs to one of them."""
    return EXPERTS in path.split(".")[:-1]


def stacked_experts(block: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weights of experts that are no modules, but slices of one parameter, by name.

    transformers 5 stacks them in three dimensions, (experts, features, features).
    """
    for path, module in block.named_modules():
        if is_linear(module) or isinstance(module, _ConvNd):
            continue
        for name, weight in module._parameters.items():
            full = f"{path}.{name}" if path else name
            if weight is not None and (is_routed(full) or _is_stack(weight)):
                yield full, weight


def _is_stack(weight: Tensor) -> bool:
    return weight.dim() == 3 and min(weight.shape) > 1
