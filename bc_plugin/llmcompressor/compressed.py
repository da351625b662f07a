"""A model's weights as its checkpoint has them, and the checkpoint itself."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

from compressed_tensors import ModelCompressor
from torch import nn

from ..errors import BiasCompensationError
from ..export import export
from ..toolkits.save import plain_vectors, saved_whole
from ..vectors import Compensation


@contextmanager
def compressed(model: nn.Module) -> Iterator[None]:
    """Compress the weights of a model, in place: vectors belong to what a checkpoint stores.

    While it lasts, running parts of the model leaves them so; afterwards, running the model
    decompresses them for good, as it does after llm-compressor's own ``save_pretrained``.
    """
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model, skip_compressed=True)
    compressor.remove_decompression_hook(model)
    try:
        yield
    finally:
        compressor.add_decompress_hook(model)


def save_compensated(model: nn.Module, native: bool) -> None:
    """Let ``model.save_pretrained`` write the vectors' entry when all else is written.

    llm-compressor has put its own function on the model, which writes the settings last.

    Args:
        native: Whether to write plain biases, in a folder that must not exist.
    """
    plain = model.save_pretrained
    signature = inspect.signature(plain, follow_wrapped=False)  # of its own, not of transformers'

    def write(given: inspect.BoundArguments) -> None:
        ModelCompressor().remove_decompression_hook(model)  # it is about to be added once more
        # On the way modules are given forwards of their own, and back: the vectors' would be lost.
        with saved_whole(model, given.arguments["save_directory"]), plain_vectors(model):
            plain(*given.args, **given.kwargs)

    @wraps(plain)
    def save_pretrained(*args: Any, **kwargs: Any) -> None:
        given = signature.bind(*args, **kwargs)
        compensated = Compensation.attached_to(model) is not None
        if compensated:
            _require_compressed(given.arguments)
        if not (compensated and native):
            return write(given)
        out = Path(given.arguments["save_directory"])
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent) as with_vectors:
            given.arguments["save_directory"] = with_vectors
            write(given)
            export(with_vectors, out, engine="vllm")

    model.save_pretrained = save_pretrained


def _require_compressed(given: dict[str, Any]) -> None:
    for name, wanted in (("save_compressed", True), ("quantization_format", None)):
        if given.get(name, wanted) != wanted:
            raise BiasCompensationError(
                f"save_pretrained({name}={given[name]!r}): the vectors belong to the weights as "
                "they are compressed by the recipe's own scheme; leave it out, or detach them: "
                "bc_plugin.Compensation.attached_to(model).detach(model)."
            )
