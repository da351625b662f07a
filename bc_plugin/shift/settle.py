"""From a site's statistics to its vectors."""

from __future__ import annotations

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..config import BiasCompensationConfig
from ..errors import BiasCompensationError
from ..vectors.contents import SiteErrors
from .statistics import Site


def settle(
    site: Site, config: BiasCompensationConfig, model_dtype: torch.dtype, may_drop: bool = True
) -> tuple[Tensor, SiteErrors] | None:
    """A site's vectors, in the type they are stored in, and its errors; None if not kept.

    A linear that is never called for an output, such as one whose weight its block takes and
    multiplies with itself (Mamba's ``dt_proj``), is left to the vectors of its block.

    Args:
        model_dtype: The type the quantized model computes in.
        may_drop: Whether it may go without vectors; weights quantized jointly with theirs may not.

    Raises:
        BiasCompensationError: no calibration token came to the site, and no block's vectors stand
            for it; or the shift is not finite.
    """
    if site.fitted.total is None:
        if site.kind == "linear" and "block" in config.sites:
            tqdm.write(f"{site.name}: left to its block, the calibration data never reaches it")
            return None
        raise BiasCompensationError(
            f"{site.name}: the calibration data never reaches this module, or not for an output "
            "that can be compared. Add 'block' to the sites, whose vectors then stand for it, or "
            "use other data."
        )
    vectors = _stored(site.fitted.vectors(), config.dtype, model_dtype)
    if not bool(torch.isfinite(vectors).all()):
        raise BiasCompensationError(
            f"{site.name}: the mean shift is not finite. Look for overflow in this module."
        )
    measured_apart = site.apart.total is not None
    errors = SiteErrors(
        before=site.fitted.error(),
        after=site.fitted.error(vectors),
        held_out_before=site.apart.error() if measured_apart else None,
        held_out_after=site.apart.error(vectors) if measured_apart else None,
    )
    worse = measured_apart and errors.held_out_after > errors.held_out_before
    if config.keep_only_if_better and worse and may_drop:
        tqdm.write(f"{site.name}: dropped, its held-out error would rise")
        return None
    return vectors, errors


def _stored(vectors: Tensor, wanted: str, model_dtype: torch.dtype) -> Tensor:
    if wanted != "auto":
        return vectors.to(getattr(torch, wanted))
    half = torch.bfloat16 if model_dtype == torch.bfloat16 else torch.float16
    fits = vectors.abs().max() <= torch.finfo(half).max
    return vectors.to(half if fits else torch.float32)
