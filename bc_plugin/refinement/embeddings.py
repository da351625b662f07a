"""Whether a float model is the one that was quantized, by what quantizing leaves as it is."""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..errors import BiasCompensationError
from ..models.offloaded import stored_value

VALUES = 1024
LEAST = 0.5  # of one checkpoint 1, less what a cast or training moved; of two unrelated ones 0


def embeddings_sample(model: nn.Module) -> Tensor:
    """Scattered values of the input embeddings, float32 (1024,); none where they are packed."""
    module = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.is_meta:
        weight = _kept_elsewhere(model, module)
    plain = isinstance(weight, Tensor) and weight.is_floating_point()
    if not plain or is_traceable_wrapper_subclass(weight):
        return torch.empty(0)
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(weight.numel(), (VALUES,), generator=generator).to(weight.device)
    return weight.detach().reshape(-1)[index].float().cpu()


def _kept_elsewhere(model: nn.Module, module: nn.Module) -> Tensor | None:
    path = next(path for path, child in model.named_modules() if child is module)
    with suppress(BiasCompensationError):  # by somebody unknown
        return stored_value(model, f"{path}.weight")
    return None


def agreement(one: Tensor, other: Tensor) -> float:
    """The cosine of two samples, 1 where nothing can be told."""
    if not (len(one) and len(other) and one.any() and other.any()):
        return 1.0
    return functional.cosine_similarity(one, other, dim=0).item()
