"""Wanda: a weight matters as much as what it carries, |weight| times the norm of its input."""

from __future__ import annotations

from torch import Tensor

from compress.layer_statistics import LayerStatistics
from compress.methods import Metric, Options


def wanda(weight: Tensor, statistics: LayerStatistics, options: Options | None = None) -> Tensor:
    """S_ij = |W_ij| · ‖X_:j‖₂ (Sun et al. 2023, equation 1). ``weight`` [N, K] -> [N, K].

    The norm is over all calibration tokens; a constant factor (their number) changes no decision. It is the
    optimal-brain score of removing one weight when the Hessian XᵀX is taken to be diagonal.
    """
    norm = statistics.sum_of_squares.sqrt().to(weight.dtype)  # [K]
    return weight.abs() * norm


WANDA = Metric(
    name="wanda",
    score=wanda,
    paper="Sun et al. 2023, A Simple and Effective Pruning Approach for LLMs (arXiv 2306.11695)",
    cost="one pass over the weights after the calibration forward",
    needs=frozenset({"sum_of_squares"}),
    group="row",
)
