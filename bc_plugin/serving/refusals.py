"""What vLLM itself refuses, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import BiasCompensationError

WIDEN = (
    "vLLM has no kernel for the weights of this compensated checkpoint on this machine ({error}). "
    "GPTQ of 2 or 3 bits is written with 4, the same values and vectors, by `bc-plugin export "
    "COMPENSATED OUT --for vllm`, and OUT is served like this one; others, quantize with 4 bits."
)


@contextmanager
def naming_the_export() -> Iterator[None]:
    """While it lasts, vLLM's refusals of a width or a format say how to get one that it takes."""
    try:
        yield
    except (ValueError, NotImplementedError) as error:
        raise BiasCompensationError(WIDEN.format(error=error)) from error
