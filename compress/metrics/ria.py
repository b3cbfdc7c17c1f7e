"""RIA: a weight matters as much as it stands out of its row and its column, times a power of its input's norm."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from compress.layer_statistics import LayerStatistics
from compress.methods import Metric, Options
from compress.metrics.terms import MOST_POWER, activation_power, reciprocal, weight_norm


class RIAOptions(Options):
    alpha: float = Field(0.5, ge=0, le=MOST_POWER, description="power of the input's norm; 0 leaves the input out")


def ria(weight: Tensor, statistics: LayerStatistics, options: RIAOptions) -> Tensor:
    """S_ij = (|W_ij| / Σ_i' |W_i'j| + |W_ij| / Σ_j' |W_ij'|) · ‖X_:j‖₂^α (Zhang et al. 2024).

    ``weight`` [N, K] -> [N, K]; 0 in rows and columns of zeros. Relative to its column and row, so that no
    channel is pruned as a whole because all of its weights are small.
    """
    sums = weight_norm(weight, "input", 1), weight_norm(weight, "output", 1)  # [1, K], [N, 1]
    return relative_importance(weight, *sums, activation_power(statistics, options.alpha))


def relative_importance(weight: Tensor, column_sums: Tensor, row_sums: Tensor, factor: Tensor) -> Tensor:
    """(|W_ij| / c_j + |W_ij| / r_i) · f_j. ``column_sums`` [1, K], ``row_sums`` [N, 1], ``factor`` [K]."""
    return weight.abs() * (reciprocal(column_sums) + reciprocal(row_sums)) * factor


RIA = Metric(
    name="ria",
    score=ria,
    paper="Zhang et al. 2024, Plug-and-Play: An Efficient Post-training Pruning Method for LLMs (ICLR)",
    cost="two passes over the weights after the calibration forward",
    needs=frozenset({"sum_of_squares"}),
    group="layer",
    options=RIAOptions,
)
