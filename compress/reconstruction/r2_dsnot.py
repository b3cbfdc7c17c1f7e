"""R²-DSnoT: DSnoT's exchanges, with relative importance and a regularizer in what is grown or pruned first.

Yi & Richtárik 2025, "Symmetric Pruning of Large Language Models" (arXiv 2501.18980). There is no published code, and
what follows is **a reading of the paper, not its letter**. It uses relative importance in the growing or in the
pruning criterion (both together are reported to hurt) and a regularizer with a weight γ of its own in either:

    R_ij = |W_ij| · (1 / Σ_i' |W_i'j| + 1 / Σ_j' |W_ij'|)                              (that of RIA)
    grow first the largest      A_ij · |s_j| / Var_j^q + γ_grow · |W_ij|^p,             A = R or |W|
    prune first the smallest    B_ij + γ_prune · |W_ij|^p,                              B = R_ij · ‖X_:j‖₂^α or the scores

s_j, Var_j^q (q = ``variance_power``) and everything else, above all which sign a candidate must have and when a row
stops, are as in `compress.reconstruction.dsnot`, which is the case A = |W|, B = the scores, γ = 0. For p = 1 the regularizer is
any ℓp norm of the single weight.

Which of the two sides gains more we could not find stated. The default is pruning, for relative importance was made
(and tested, as RIA) as a criterion of what to prune, while what is grown is chosen to correct the mean output.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from compress.layer_statistics import LayerStatistics
from compress.methods import Pruning, Reconstructed, Reconstruction
from compress.metrics.ria import RIAOptions, ria
from compress.metrics.terms import MOST_POWER, MOST_WEIGHT
from compress.reconstruction.dsnot import DSnoTOptions, exchange, growth_scale


class R2DSnoTOptions(DSnoTOptions):
    relative: Literal["prune", "grow"] = Field("prune", description="which criterion uses relative importance")
    alpha: float = Field(0.5, ge=0, le=1, description="exponent of the input's norm beside relative importance")
    gamma_grow: float = Field(
        0.0, ge=0, le=MOST_WEIGHT, description="weight of the regularizer in growing; the paper: 0, 1e-4, 1e-3"
    )
    gamma_prune: float = Field(
        0.0, ge=0, le=MOST_WEIGHT, description="weight of the regularizer in pruning; the paper: 0, 1e-4, 1e-3"
    )
    p: float = Field(1.0, gt=0, le=MOST_POWER, description="the regularizer is |W|^p")


def r2_dsnot(weight: Tensor, pruning: Pruning, statistics: LayerStatistics, options: R2DSnoTOptions) -> Reconstructed:
    """A better mask for the same ``weight`` [N, K]; keeps patterns like `compress.reconstruction.dsnot.dsnot`."""
    assert pruning.scores is not None, "the pipeline gives the scores to every method without a metric of its own"
    grows = ria(weight, statistics, RIAOptions(alpha=0)) if options.relative == "grow" else weight
    growing = (grows * growth_scale(statistics, options)).abs_()
    staying = pruning.scores
    if options.relative == "prune":
        staying = ria(weight, statistics, RIAOptions(alpha=options.alpha))
    penalty = weight.abs().pow_(options.p)
    return exchange(
        weight,
        pruning,
        statistics,
        options,
        growing + options.gamma_grow * penalty,
        staying + options.gamma_prune * penalty,
    )


R2_DSNOT = Reconstruction(
    name="r2-dsnot",
    run=r2_dsnot,
    paper="Yi & Richtárik 2025, Symmetric Pruning of Large Language Models (arXiv 2501.18980)",
    cost="as dsnot",
    needs=frozenset({"moments", "sum_of_squares"}),
    options=R2DSnoTOptions,
)
