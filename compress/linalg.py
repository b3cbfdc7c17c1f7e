"""Factorizations of damped Gram matrices, with what has to be done when one is not positive definite."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from compress.errors import NumericalError
from compress.layer_statistics import LayerStatistics

MAX_DAMPING = 1.0


@dataclass(frozen=True)
class InverseFactor:
    """``upper`` [K, K] with (H + λI)⁻¹ = UᵀU, U upper triangular, λ = ``damping`` · mean(diag H).

    ``raised_from`` is the damping that was asked for when it had to be raised, else None.
    ``dead`` [K] marks the inputs that were zero in all calibration tokens (H_jj = 0, replaced by 1).
    """

    upper: Tensor
    damping: float
    raised_from: float | None
    dead: Tensor


def shared_factor(statistics: LayerStatistics, damping: float) -> tuple[InverseFactor, dict[str, Any]]:
    """`inverse_factor` of a layer's Gram matrix, once for the layers that read one input, and notes for the report."""
    key = ("inverse_factor", damping)
    if key not in statistics.factors:
        statistics.factors[key] = inverse_factor(statistics.gram, damping)
    factor = cast(InverseFactor, statistics.factors[key])
    notes: dict[str, Any] = {"damping": factor.damping}
    if factor.raised_from is not None:
        notes["damping_raised_from"] = factor.raised_from
    if dead := int(factor.dead.sum()):
        notes["dead_inputs"] = dead
    return factor, notes


def inverse_factor(gram: Tensor, damping: float) -> InverseFactor:
    """Factors the inverse of a damped Gram matrix without ever forming the inverse.

    With P the reversal of the axes, the Cholesky factor L of P H P gives H⁻¹ = (P L⁻¹ P)ᵀ (P L⁻¹ P), and
    P L⁻¹ P is upper triangular: one factorization and one triangular solve instead of three.

    A matrix that is not positive definite gets ten times the damping, again in float64 when it fails in
    float32, up to ``MAX_DAMPING``; the caller reports it. Nothing ever replaces it by the identity.

    Args:
        gram: [K, K] symmetric, float32 or float64, on any device.
        damping: λ as a share of the mean of the diagonal (SparseGPT's ``percdamp``).

    Raises:
        NumericalError: even ``MAX_DAMPING`` does not help.
    """
    diagonal = gram.diagonal()
    dead = diagonal == 0
    ridge = diagonal.mean() if bool(diagonal.any()) else torch.ones((), dtype=gram.dtype, device=gram.device)
    tried = damping
    while True:
        damped = gram.clone()
        damped.diagonal().add_(dead.to(gram.dtype)).add_(tried * ridge)
        reversed_ = damped.flip(0, 1)
        lower, info = torch.linalg.cholesky_ex(reversed_)
        if int(info) != 0 and gram.dtype == torch.float32:
            lower, info = torch.linalg.cholesky_ex(reversed_.double())
        if int(info) == 0:
            identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
            upper = torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1).to(gram.dtype)
            # (an infinity on the diagonal of the Gram matrix gives a factor of zeros)
            if bool(torch.isfinite(upper).all()) and bool((upper.diagonal() > 0).all()):
                return InverseFactor(upper.contiguous(), tried, None if tried == damping else damping, dead)
        if tried >= MAX_DAMPING:
            raise NumericalError(
                f"the Gram matrix cannot be factored even with a damping of {tried:g} of its mean diagonal; "
                "more calibration samples or a larger damping may help"
            )
        tried = min(max(tried, 1e-6) * 10, MAX_DAMPING)


def normalised(gram: Tensor) -> tuple[Tensor, Tensor]:
    """The scale n [K], n_j = sqrt(H_jj), and H / nnᵀ [K, K] with a unit diagonal; a dead input has n_j = 0 and stands alone.

    ``gram`` H [K, K] symmetric.
    """
    scale = gram.diagonal().clamp(min=0).sqrt()
    inverse = torch.where(scale > 0, 1 / scale, 0)
    unit = gram * inverse * inverse[:, None]
    unit.diagonal().fill_(1)
    return scale, unit
