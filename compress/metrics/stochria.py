"""stochRIA: RIA whose row and column sums are estimated from a few entries."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from compress.layer_statistics import LayerStatistics
from compress.methods import Metric
from compress.metrics.ria import RIAOptions, relative_importance
from compress.metrics.terms import activation_power, weight_norm


class StochRIAOptions(RIAOptions):
    fraction: float = Field(0.1, gt=0, le=1, description="share of a row or column that its sum is estimated from")


def stochria(weight: Tensor, statistics: LayerStatistics, options: StochRIAOptions) -> Tensor:
    """S_ij = (|W_ij| / ĉ_j + |W_ij| / r̂_i) · ‖X_:j‖₂^α (stochRIA of Yi & Richtárik 2025).

    ``weight`` [N, K] -> [N, K]. r̂ and ĉ are unbiased estimates of the row and column sums of |W|: the sums over a
    random subset without replacement, divided by the share that was drawn. A sum that is estimated as zero adds
    nothing to the score, as a sum that is zero does. With ``fraction=1`` this is RIA to the bit.

    No code was published, and the paper's numbers could not be checked against one. The form and the share of 0.1
    are the paper's. Chosen here: all rows share one subset of columns, and all columns one of rows (with subsets of
    their own, the random numbers would cost more than the sums they replace), and it is drawn without replacement.
    """
    generator = statistics.generator()
    rows, columns = (_subset(size, options.fraction, generator).to(weight.device) for size in weight.shape)
    column_sums = weight_norm(weight[rows], "input", 1) * (weight.shape[0] / len(rows))  # [1, K]
    row_sums = weight_norm(weight[:, columns], "output", 1) * (weight.shape[1] / len(columns))  # [N, 1]
    return relative_importance(weight, column_sums, row_sums, activation_power(statistics, options.alpha))


def _subset(size: int, fraction: float, generator: torch.Generator) -> Tensor:
    """The given share of 0 ... size - 1, at least one of them, in ascending order."""
    drawn = max(round(fraction * size), 1)
    return torch.randperm(size, generator=generator)[:drawn].sort().values


STOCHRIA = Metric(
    name="stochria",
    score=stochria,
    paper="Yi & Richtárik 2025, Symmetric Pruning of Large Language Models (arXiv 2501.18980)",
    cost="as ria, with a tenth of the sums",
    needs=frozenset({"sum_of_squares"}),
    group="layer",
    options=StochRIAOptions,
)
