"""``save_pretrained`` of a model that a recipe has compensated."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Mapping
from contextlib import nullcontext
from functools import wraps
from pathlib import Path
from typing import Any

from compressed_tensors.distributed import is_source_process
from compressed_tensors.offload import as_single_threaded
from llmcompressor.transformers.compression.compressed_tensors_utils import (
    suspend_distributed_timeout,
)
from torch import nn

from ..errors import BiasCompensationError
from ..export import export
from ..toolkits.save import plain_vectors, saved_whole
from ..vectors import Compensation
from .compressed import Integers, compressed


def save_compensated(model: nn.Module, native: bool) -> None:
    """Let ``model.save_pretrained`` write the vectors' entry when all else is written.

    llm-compressor has put its own function on the model, which writes the settings last.

    With several ranks all of them have to call it, as ever, and the first one writes.

    Args:
        model: Compressed.
        native: Whether to write plain biases, in a folder that must not exist.
    """
    plain, integers = model.save_pretrained, Integers(model)
    signature = inspect.signature(plain, follow_wrapped=False)  # of its own, not of transformers'

    def write(given: inspect.BoundArguments) -> None:
        # On the way modules are given forwards of their own, and back: the vectors' would be lost.
        folder = given.arguments["save_directory"]
        bound = saved_whole(model, folder) if is_source_process() else nullcontext()
        with bound, plain_vectors(model) as vectors:
            integers.restore()
            with compressed(model):
                if vectors is not None:
                    vectors.check(model)
                plain(*given.args, **given.kwargs)

    @wraps(plain)
    def save_pretrained(*args: Any, **kwargs: Any) -> None:
        given = signature.bind(*args, **kwargs)
        _require_compressed(given.arguments)
        if not native or Compensation.attached_to(model) is None:
            write(given)
            return
        out = Path(given.arguments["save_directory"])
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent) as with_vectors:
            given.arguments["save_directory"] = with_vectors
            write(given)
            with suspend_distributed_timeout():
                if is_source_process():
                    with as_single_threaded():  # it loads the result, alone
                        export(with_vectors, out, engine="vllm")

    model.save_pretrained = save_pretrained


def _require_compressed(given: Mapping[str, Any]) -> None:
    for name, wanted in (("save_compressed", True), ("quantization_format", None)):
        if given.get(name, wanted) != wanted:
            raise BiasCompensationError(
                f"save_pretrained({name}={given[name]!r}): vectors belong to weights as they are "
                "compressed by the recipe's own scheme, and the model's are; leave it out."
            )
