"""A compensated file against the plugin: in llama.cpp where that is at hand, else in transformers.

llama.cpp rounds activations to eight bits, so its logits are never quite those of transformers.
What vectors change in them is compared.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import BiasCompensationError
from ..vectors.compensation import Compensation
from .compensated import compensation_in
from .file import GGUFFile, control_of
from .load import load_model

TOKENS = 48
ROUNDING = 0.2  # of the logits' own size; what llama.cpp rounds is a few hundredths of it
WORKER = Path(__file__).with_name("llama_cpp_logits.py").absolute()


def verify(source: GGUFFile, written: Path, model: nn.Module, compensation: Compensation) -> str:
    """Compare a compensated file with its source and with the plugin, in logits of some tokens.

    Args:
        source: What it was made of, as it may have been compensated before.
        model: The source, dequantized and without vectors.
        compensation: The vectors as the file has them.

    Returns:
        Who has loaded it, in words.

    Raises:
        BiasCompensationError: it cannot be loaded, or gives other logits than the plugin; or its
            source gives others than transformers, which the vectors were computed with.
    """
    ids = _tokens(model)
    plain = _logits(model, ids, compensation_in(source))
    expected = _logits(model, ids, compensation)
    if has_llama_cpp():
        by, theirs = "llama.cpp", llama_cpp_logits(source.path, ids)
        found = llama_cpp_logits(written, ids)
    else:
        by, theirs = "transformers' reader of GGUF files", plain
        file = GGUFFile(written)
        again = load_model(file, config=model.config)
        found = _logits(again, ids, compensation_in(file))
    effect = (expected - plain).norm()
    apart, rounding = (found - theirs - (expected - plain)).norm(), (theirs - plain).norm()
    if not rounding <= ROUNDING * (plain - plain.mean(-1, keepdim=True)).norm():
        raise BiasCompensationError(
            f"{by} gives other logits with {source.path} than transformers, by {rounding:.3g} of "
            f"{plain.norm():.3g}, so vectors that transformers computes do not fit it. Its "
            "settings differ from those of the float model's config; name the float model that it "
            "was made of."
        )
    if not apart <= torch.maximum(0.3 * effect, 2 * rounding):
        raise BiasCompensationError(
            f"{by} gives other logits with what was written than the plugin, and it has been "
            f"deleted: they are {apart:.3g} apart, where compensation moves them by {effect:.3g}. "
            "Does the float model's config fit the file? If it does, please report this."
        )
    return by


def has_llama_cpp() -> bool:
    """Whether llama-cpp-python is installed."""
    return find_spec("llama_cpp") is not None


def llama_cpp_logits(path: Path, ids: Tensor, control: bool = True) -> Tensor:
    """What llama.cpp gives for sequences, with the control vector that is beside the file, if any.

    Args:
        ids: Tokens, int64 (sequences, length).
        control: Whether to use that.

    Returns:
        Logits, float32 (sequences, length, vocabulary).

    Raises:
        BiasCompensationError: llama.cpp does not load the file.
    """
    beside = control_of(path) if control and control_of(path).is_file() else None
    libraries = Path(find_spec("llama_cpp").origin).parent / "lib"
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("ids.npy", "logits.npy")]
        np.save(files[0], ids.cpu().numpy())
        models = [str(path.absolute()), "-" if beside is None else str(beside.absolute())]
        process = subprocess.run(
            [sys.executable, str(WORKER), *models, *map(str, files)],
            capture_output=True,
            text=True,
            cwd=libraries if libraries.is_dir() else None,  # it looks for its backends there
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        if process.returncode:
            raise BiasCompensationError(f"llama.cpp does not run {path}:\n{process.stderr[-2000:]}")
        return torch.from_numpy(np.load(files[1]))


def _tokens(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (1, TOKENS), generator=generator)


@torch.no_grad()
def _logits(model: nn.Module, ids: Tensor, compensation: Compensation | None = None) -> Tensor:
    if compensation is not None:
        compensation.attach_unchecked(model)
    try:
        return model(input_ids=ids.to(next(model.parameters()).device)).logits.float().cpu()
    finally:
        if compensation is not None:
            compensation.detach(model)
