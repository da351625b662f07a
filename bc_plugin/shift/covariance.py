"""What a bias leaves of the inputs of linears: their covariance."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from ..errors import BiasCompensationError
from ..models.calls import BlockCalls
from ..models.modules import device_of, dtype_of, gives_features
from ..models.positions import site_index, vector_rows
from ..models.rows import sums
from ..ranks import add_up, are_several, gathered
from .rescaling import Rescaling

OTHER_INPUTS = (
    "{}: what goes into one linear on one rank goes into several on another, so scales cannot be "
    "fitted; give each rank a share of data of one kind."
)


class Moments:
    """Sums of tokens less an estimate of their mean, and of their products, float64."""

    SUMS = ("count", "total", "products")

    def __init__(self) -> None:
        self.count = 0
        self.total: Tensor | None = None
        self.products: Tensor | None = None

    def update(self, inputs: Tensor) -> None:
        """Add tokens, (tokens, features)."""
        self.count += len(inputs)
        total, products = sums(inputs), (inputs.T @ inputs).double()
        self.total = total if self.total is None else self.total.add_(total)
        self.products = products if self.products is None else self.products.add_(products)

    def move(self, by: Tensor) -> None:
        """Turn to another estimate, ``by`` larger, float64 (features,)."""
        if self.count:
            cross = self.total.outer(by)
            self.products -= cross + cross.T - self.count * by.outer(by)
            self.total = self.total - self.count * by

    def mean(self) -> Tensor:
        return self.total / self.count

    def covariance(self) -> Tensor:
        mean = self.mean()
        return self.products / self.count - mean.outer(mean)


class InputCovariance:
    """Running sums of the inputs of a linear, on the tokens to fit to and on those held out.

    Tokens that share a vector count; an attention sink that has its own has nothing but a mean.
    Products are of inputs less a first estimate of their mean, so that float32 does not lose them.
    """

    def __init__(self) -> None:
        self.estimate: Tensor | None = None
        self.moments = Moments(), Moments()
        self.leading = Moments()

    def lead(self, inputs: Tensor) -> None:
        """Add tokens with a vector of their own, (tokens, in_features), which are not centred."""
        self.leading.update(inputs.to(torch.promote_types(inputs.dtype, torch.float32)))

    def update(self, inputs: Tensor, apart: bool) -> None:
        """Add tokens, (tokens, in_features)."""
        inputs = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
        if self.estimate is None:
            self.estimate = inputs.mean(0)
        self.moments[apart].update(inputs - self.estimate)

    def add_up(self) -> None:
        """Make the sums those over all ranks, each of which has estimated for itself."""
        own = self.estimate
        estimates = gathered(None if own is None else own.cpu().double())
        common = torch.stack([each for each in estimates if each is not None]).mean(0)
        if own is not None:
            for moments in self.moments:
                moments.move((common - own.cpu()).to(own.device))
        self.estimate = common
        add_up(*self.moments, self.leading)

    def fitted(self) -> Tensor:
        """Of the tokens to fit to, float64 (in_features, in_features)."""
        return self.moments[False].covariance()

    def with_leading(self) -> Tensor:
        """``fitted``, and the second moment of tokens with a vector of their own.

        An attention sink has nothing but a mean. Integers that are chosen without it leave all of
        it to the vector, and gain nothing for the other tokens.
        """
        fitted = self.fitted()
        if not self.leading.count:
            return fitted
        return fitted + self.leading.products / self.moments[False].count

    def apart(self) -> Tensor | None:
        """The same of those held out, about the mean that the bias takes out: the others'."""
        fitted, apart = self.moments
        if not apart.count:
            return None
        off = apart.mean() - fitted.mean()
        return apart.covariance() + off.outer(off)


def input_covariances(
    name: str,
    number: int,
    reference: nn.Module,
    linears: Sequence[str],
    stream: Sequence[BlockCalls],
    positions: int,
    rescaling: Rescaling,
    leading: bool,
) -> dict[str, InputCovariance]:
    """Run the float block, and look at what the linears of the quantized one would be given.

    Args:
        name, number: Path and number of the block.
        reference: The float block.
        linears: Paths within the block.
        stream: What the block is called with.
        positions: Number of leading positions with a vector of their own.
        rescaling: The scales that were moved within the block.
        leading: Whether tokens with a vector of their own are looked at, too.

    Returns:
        By path, for those that tokens come to; linears that are given the same share one.
    """
    set_apart = min(positions, 1)  # a mean of its own for each would leave little
    found: dict[str, InputCovariance] = {}
    leaders: dict[str, str] = {}
    given: dict[str, Tensor] = {}
    current: BlockCalls | None = None

    def observe(path: str):
        def hook(linear: nn.Module, args: tuple, output: Tensor) -> None:
            if not gives_features(linear, output):
                return
            inputs = args[0]
            given[path] = inputs
            leader = next(p for p in given if given[p] is inputs and _alike(rescaling, p, path))
            if found.setdefault(path, found.get(leader) or InputCovariance()) is not found[leader]:
                raise BiasCompensationError(
                    f"{name}: {leader} and {path} are given the same inputs in one batch and not "
                    "in another, which scales cannot be fitted to."
                )
            leaders[path] = leader
            if leader == path:
                site = f"{name}.{path}"
                where = current.index, current.context
                index = site_index(site, positions, inputs.shape[:-1], *where).flatten()
                rows = vector_rows(index, set_apart)
                moved = rescaling.input_of(path, inputs).flatten(0, -2)
                shared = ((index >= 0) & (rows == set_apart)).to(moved.device)
                found[path].update(moved[shared], current.apart)
                first = (rows < set_apart).to(moved.device)
                if leading and not current.apart and bool(first.any()):
                    found[path].lead(moved[first])

        return hook

    with ExitStack() as hooks:
        for path in linears:
            handle = reference.get_submodule(path).register_forward_hook(observe(path))
            hooks.callback(handle.remove)
        for current in stream:
            given.clear()
            # Not lasting: the block is run again on the same calls.
            current.run(reference, number, device_of(reference), dtype_of(reference))
    if are_several():
        leaders = _agreed(gathered(leaders), name)
        for path in leaders.values():
            found.setdefault(path, InputCovariance())  # on this rank nothing came to it
        for path, leader in leaders.items():
            found[path] = found[leader]
            if path == leader:
                found[path].add_up()
    return found


def _agreed(leaders: Sequence[dict[str, str]], name: str) -> dict[str, str]:
    """By path, whose inputs a linear is given, from what the ranks have found."""
    agreed: dict[str, str] = {}
    for found in leaders:
        if any(agreed.setdefault(path, leader) != leader for path, leader in found.items()):
            raise BiasCompensationError(OTHER_INPUTS.format(name))
    return agreed


def _alike(rescaling: Rescaling, one: str, other: str) -> bool:
    scales = rescaling.inputs.get(one), rescaling.inputs.get(other)
    if scales[0] is None or scales[1] is None:
        return scales[0] is scales[1]
    return torch.equal(*scales)
