"""For toolkits that collect a model's tensors themselves, past the hooks of its state dict."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..names import KEY
from ..vectors.compensation import Compensation


@contextmanager
def plain_vectors(model: nn.Module) -> Iterator[Compensation | None]:
    """While this lasts the vectors are buffers of a model that is not compensated by them.

    No bias has a vector merged into it then, so whoever reads tensor after tensor reads what
    belongs into a file.
    """
    compensation = Compensation.attached_to(model)
    if compensation is None:
        yield None
        return
    compensation.detach(model)
    put_vectors(compensation, model)
    try:
        yield compensation
    finally:
        take_vectors(compensation, model)
        compensation.attach_unchecked(model)


def put_vectors(compensation: Compensation, model: nn.Module) -> None:
    """Make the vectors buffers of ``model``, without compensating it."""
    for name, vectors in compensation.vectors.items():
        model.get_submodule(name).register_buffer(KEY, vectors)


def take_vectors(compensation: Compensation, model: nn.Module) -> None:
    """Undo ``put_vectors``."""
    for name in compensation.vectors:
        delattr(model.get_submodule(name), KEY)
