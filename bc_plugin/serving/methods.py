"""vLLM's own linear methods, with each token's row of a table added to what they give.

The classes are derived from vLLM's and keep their names, since vLLM asks for both.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from vllm.model_executor.layers.linear import LinearMethodBase

from ..errors import BiasCompensationError
from ..names import KEY
from .refusals import naming_the_export

ROWS = KEY + "_rows"
# In latent attention it is folded into other products, by running it on a unit matrix.
FOLDED = "kv_b_proj"


class UntilAttached(LinearMethodBase):
    """A linear of a compensated checkpoint before its vectors are in place."""

    def create_weights(self, *args: Any, **kwargs: Any) -> None:
        """vLLM's own."""
        with naming_the_export():
            super().create_weights(*args, **kwargs)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Raises, since without vectors it is another model."""
        if layer.prefix.rpartition(".")[2] == FOLDED:
            return super().apply(layer, x, bias)
        raise BiasCompensationError(
            "this checkpoint has bias_compensation vectors, which this way of loading a model "
            "passes by; load it with vLLM's default load_format."
        )


class WithVectors(LinearMethodBase):
    """A linear with a table."""

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """vLLM's output, compensated. Kernels that store a bias in an order of theirs get none."""
        return with_rows(layer, super().apply(layer, x, bias))


def until_attached(method: LinearMethodBase) -> None:
    """Have a method refuse to run."""
    method.__class__ = _derived(UntilAttached, type(method))


def with_vectors(layer: nn.Module, table: Tensor, rows: Tensor | None) -> None:
    """Give a linear its vectors; for the arguments see ``set_table``."""
    set_table(layer, table, rows)
    layer.quant_method.__class__ = _derived(WithVectors, _own_class(layer.quant_method))


def without_vectors(layer: nn.Module) -> None:
    """A linear that has none is vLLM's own again."""
    layer.quant_method.__class__ = _own_class(layer.quant_method)


def set_table(module: nn.Module, table: Tensor, rows: Tensor | None) -> None:
    """Put a table on a module, as buffers, which compiled graphs take as inputs.

    Args:
        table: (positions + 1, features of this process).
        rows: The row of each token of a batch, int64; None where there is one for all.
    """
    module.register_buffer(KEY, table, persistent=False)
    module.register_buffer(ROWS, rows, persistent=False)


def with_rows(module: nn.Module, hidden: Tensor) -> Tensor:
    """Hidden states, (tokens, features), with each token's row of the module's table added."""
    table, rows = getattr(module, KEY), getattr(module, ROWS)
    if rows is None:
        return hidden + table[0]
    if hidden.dim() != 2:
        raise BiasCompensationError(
            f"a {type(module).__name__} gives a tensor of {hidden.dim()} dimensions, expected "
            "(tokens, features), so the positions of its tokens are unknown; compensate with "
            "positions=0."
        )
    return hidden + functional.embedding(rows[: hidden.shape[0]], table)


def add_to_block(module: nn.Module, args: tuple, output: Any) -> Any:
    """A hook on a block: what it gives is (hidden, residual), whose sum is its output."""
    if isinstance(output, tuple):
        return (with_rows(module, output[0]), *output[1:])
    return with_rows(module, output)


def _own_class(method: LinearMethodBase) -> type[LinearMethodBase]:
    kind = type(method)
    return kind.__mro__[2] if issubclass(kind, (UntilAttached, WithVectors)) else kind


@cache
def _derived(ours: type[LinearMethodBase], kind: type[LinearMethodBase]) -> type[LinearMethodBase]:
    return type(kind.__name__, (ours, kind), {"__module__": __name__})
