"""What the layers before have lost, put right by a linear's weight.

In a quantized model a linear is given other inputs than in the float model. The weight whose
outputs on those come closest to the float linear's on its own is another than the float weight
(GPTAQ, Li et al., arXiv 2504.02692), and rounding should come close to that one.
"""

from __future__ import annotations

import torch
from torch import Tensor


def weight_for(weight: Tensor, covariance: Tensor, drift: Tensor, damping: float) -> Tensor:
    """The weight to be rounded, ``W + W D (C + d)^-1``.

    Rounding it with the error measured in ``C + d`` minimises ``|W X - Q Y|^2 + d |W - Q|^2``, with
    X the float model's inputs and Y the quantized one's, each without its mean.

    Args:
        weight: The float linear's, (out_features, in_features).
        covariance: Of the inputs, ``Y Y^T`` or a multiple of it, (in_features, in_features).
        drift: The same multiple of ``(X - Y) Y^T``, (in_features, in_features).
        damping: d, as a share of the mean of the covariance's diagonal.

    Returns:
        float32, shaped as ``weight``; the weight itself where the covariance is zero.
    """
    damped = covariance.double()
    damped = damped + damping * damped.diagonal().mean() * torch.eye(
        len(damped), dtype=damped.dtype, device=damped.device
    )
    factor, failed = torch.linalg.cholesky_ex(damped)
    if failed:
        return weight.float()
    missing = weight.double() @ drift.double()
    return (weight.double() + torch.cholesky_solve(missing.T, factor).T).float()
