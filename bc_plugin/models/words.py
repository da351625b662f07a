"""The words that quantized linears keep their integers in, to put others there.

Whether they are packed as expected is seen by what comes out: the integers that the kernel
multiplies by, but for a zero point that each group of each channel has.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import BiasCompensationError
from ..marks import mark, mark_of
from .integers import FORMATS, IntegerWeight, overwrite, packed_tensor
from .packed import AT_ONCE, AWQ_ORDER, WORD, in_order, pack, unpack

WIDTHS = range(2, 9)


@dataclass(frozen=True)
class Packing:
    """How integers stand in 32-bit words.

    Attributes:
        bits: Of an integer.
        by_inputs: Whether a word has integers of one output channel, and lies along the inputs.
        inputs_first: Whether rows of words are along the inputs.
        padded: Whether no integer goes on in the next word.
    """

    bits: int
    by_inputs: bool
    inputs_first: bool
    padded: bool = False

    @property
    def _dim(self) -> int:
        """The dimension in which the integers of a word follow each other."""
        return int(self.by_inputs != self.inputs_first)

    def unpacked(self, words: Tensor, inputs: int) -> Tensor:
        """Integers from 0 up, int32 (out_features, in_features)."""
        found = unpack(words, self.bits, self._dim, self.padded)
        if not self.by_inputs:
            found = in_order(found)
        found = found.T if self.inputs_first else found
        return found[:, :inputs]

    def packed(self, integers: Tensor) -> Tensor:
        """The words, of ``integers`` as ``unpacked`` gives them."""
        values = integers.T if self.inputs_first else integers
        if not self.by_inputs:
            values = values.view(len(values), -1, len(AWQ_ORDER))[..., list(AWQ_ORDER)].flatten(1)
        if self.padded:
            values = nn.functional.pad(values, (0, -values.shape[1] % (WORD // self.bits)))
        return pack(values, self.bits, self._dim, self.padded)


@dataclass(frozen=True)
class PackedIntegers:
    """The integers of a linear where its toolkit keeps them.

    Attributes:
        words: The toolkit's own tensor.
        zeros: What the kernel takes from each integer, int32 (out_features, groups).
        groups: The group of each input channel, int64 (in_features,).
    """

    words: Tensor
    packing: Packing
    zeros: Tensor
    groups: Tensor

    @property
    def low(self) -> Tensor:
        """The least that integers less their zero points can be, (out_features, groups)."""
        return -self.zeros

    @property
    def high(self) -> Tensor:
        """The largest."""
        return 2**self.packing.bits - 1 - self.zeros

    def write(self, integers: Tensor) -> None:
        """Put integers less their zero points, (out_features, in_features), in the words."""
        parts = [
            self.packing.packed(integers[rows].int() + self.zeros[rows][:, self.groups])
            for rows in _rows(integers)
        ]
        overwrite(self.words, torch.cat(parts, int(self.packing.inputs_first)))


def packed_integers(path: str, linear: nn.Module, weight: IntegerWeight) -> PackedIntegers:
    """Where a quantized linear keeps its integers.

    Args:
        path: Its own.
        weight: What ``integer_weights`` found of it.

    Raises:
        BiasCompensationError: they are packed in a way that is not known.
    """
    words = packed_tensor(linear)
    outputs, inputs = weight.integers.shape
    if words is not None and words.dtype == torch.int32 and words.dim() == 2:
        for packing in _candidates(tuple(words.shape), inputs, outputs):
            zeros = _zeros(packing.unpacked(words, inputs), weight)
            if zeros is not None:
                return PackedIntegers(words, packing, zeros, weight.groups)
    raise BiasCompensationError(
        f"{path} is a {type(linear).__name__}, which keeps its integers in a way that is not "
        f"known, so no others can be put there. Choosing integers takes {FORMATS}; leave integers "
        "out, or load the checkpoint with another backend."
    )


@dataclass(frozen=True)
class ChosenIntegers:
    """What a model is marked with whose integers are others than when it was loaded.

    Attributes:
        linears: Paths of the linears.
    """

    linears: frozenset[str]


def mark_chosen(model: nn.Module, linears: Iterable[str]) -> None:
    """Remember that the integers of these linears were chosen again."""
    mark(model, ChosenIntegers(chosen_linears(model).union(linears)))


def chosen_linears(model: nn.Module) -> frozenset[str]:
    """The linears whose integers are others than when the model was loaded."""
    found = mark_of(model, ChosenIntegers)
    return frozenset() if found is None else found.linears


def _candidates(shape: tuple[int, int], inputs: int, outputs: int) -> Iterator[Packing]:
    for bits in WIDTHS:
        each = WORD // bits
        if shape == (inputs * bits // WORD, outputs) and inputs * bits % WORD == 0:
            yield Packing(bits, by_inputs=True, inputs_first=True)
        if shape == (inputs, outputs // each) and outputs % len(AWQ_ORDER) == 0 and bits == 4:
            yield Packing(bits, by_inputs=False, inputs_first=True)
        if shape == (outputs, inputs * bits // WORD) and inputs * bits % WORD == 0:
            yield Packing(bits, by_inputs=True, inputs_first=False)
        if shape == (outputs, -(-inputs // each)):
            yield Packing(bits, by_inputs=True, inputs_first=False, padded=True)


def _zeros(found: Tensor, weight: IntegerWeight) -> Tensor | None:
    """What is taken from the integers of each group; None if that is not one number."""
    apart = found - weight.integers
    zeros = apart.new_zeros(weight.stored.shape)
    zeros[:, weight.groups] = apart
    return zeros if torch.equal(zeros[:, weight.groups], apart) else None


def _rows(values: Tensor) -> Iterator[slice]:
    """Output channels, so many that few integers are packed at once."""
    step = max(WORD, AT_ONCE // values.shape[1] // WORD * WORD)
    for start in range(0, len(values), step):
        yield slice(start, start + step)
