"""What several metrics are made of, so that one computes to the bit what another does where they are the same.

Axes: ``N`` output features (rows), ``K`` input features (columns). Norms are taken in float64 and returned in
float32, so that tiny weights do not underflow in a square and zeros stay the only ones with norm zero.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from compress.layer_statistics import LayerStatistics

Side = Literal["input", "output"]

MOST_POWER = 4
"""Of a norm in a score: float32 has room for norms from 1e-9 to 1e9 then. Papers use 0.5, and try 0 to 1."""
MOST_WEIGHT = 1e9
"""Of a term in a score; there is nothing left of the other term far below it."""

_LARGE = torch.finfo(torch.float32).max / 4
"""Room for the sum of two reciprocals."""
_SAFE_POWER = 6
"""To which any float32 number may be raised in float64 without leaving its range."""


def input_norm(statistics: LayerStatistics) -> Tensor:
    """‖X_:j‖₂ over all calibration tokens, [K] float32."""
    return statistics.sum_of_squares.sqrt().float()


def sample_norm(statistics: LayerStatistics) -> Tensor:
    """sqrt(Σ_t x_tj² / samples), [K] float32: what the codes of Wanda and its successors call ‖X_:j‖₂.

    Their running mean is over calibration samples, not tokens. It matters only where another term is added.
    """
    return (statistics.sum_of_squares / statistics.windows).sqrt().float()


def output_norm(statistics: LayerStatistics) -> Tensor:
    """‖Y_:i‖₂ over all calibration tokens of the dense output, [N] float32."""
    return statistics.output_sum_of_squares.sqrt().float()


def activation_power(statistics: LayerStatistics, exponent: float) -> Tensor:
    """‖X_:j‖₂ to the given power, [K] float32; 0 for a dead input unless the exponent is 0."""
    return statistics.sum_of_squares.sqrt().pow(exponent).float()


def weight_norm(weight: Tensor, side: Side, p: float) -> Tensor:
    """The p-norm of each column, [1, K] ("input"), or of each row, [N, 1] ("output") of ``weight`` [N, K]; float64."""
    dim = 0 if side == "input" else 1
    if p <= _SAFE_POWER:
        return torch.linalg.vector_norm(weight, p, dim=dim, keepdim=True, dtype=torch.float64)
    largest = weight.abs().amax(dim=dim, keepdim=True).double()
    scaled = weight / largest.clamp(min=torch.finfo(torch.float64).tiny)  # its largest is 1, which no power takes away
    return largest * torch.linalg.vector_norm(scaled, p, dim=dim, keepdim=True)


def reciprocal(norm: Tensor) -> Tensor:
    """1 / norm in float32, 0 where the norm is 0: a row or column of zeros has no weight that could matter."""
    return torch.where(norm > 0, norm.reciprocal().clamp(max=_LARGE), 0.0).float()
