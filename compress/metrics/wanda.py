"""Wanda: a weight matters as much as what it carries, |weight| times the norm of its input."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from compress.errors import RecipeError
from compress.layer_statistics import LayerStatistics
from compress.methods import Metric, Options
from compress.metrics.terms import input_norm
from compress.patterns import Group, NMPattern, Pattern


class WandaOptions(Options):
    variant: bool = Field(
        False,
        description="prune as many weights of each row as carry one share of its score; pattern unstructured only",
    )

    @property
    def group(self) -> Group | None:
        return "layer" if self.variant else None

    def check(self, pattern: Pattern) -> None:
        if self.variant and isinstance(pattern, NMPattern):
            raise RecipeError(
                f"variant=true of wanda chooses how many weights each row keeps, and {pattern} fixes that; leave variant "
                "out, or use pattern 'unstructured' (flags --pattern unstructured --sparsity 0.5 --format dense)"
            )


def wanda(weight: Tensor, statistics: LayerStatistics, options: WandaOptions | None = None) -> Tensor:
    """S_ij = |W_ij| · ‖X_:j‖₂ (Sun et al. 2023, equation 1). ``weight`` [N, K] -> [N, K].

    The norm is over all calibration tokens; a constant factor (their number) changes no decision. It is the
    optimal-brain score of removing one weight when the Hessian XᵀX is taken to be diagonal.

    With ``variant``, described in the paper's appendix, the score is the weight's `cumulative_share`.
    """
    scores = weight.abs() * input_norm(statistics)  # [N, K]
    return cumulative_share(scores) if options is not None and options.variant else scores


def cumulative_share(scores: Tensor) -> Tensor:
    """The share of its row's total score that a weight and all smaller ones of the row have together.

    ``scores`` [N, K], not negative -> [N, K] float32 in [0, 1]; 0 throughout a row of zeros.

    The variant prunes in each row the weights whose share is at most α, with one α for the layer such that the
    layer gets its sparsity. The paper's code finds α by bisection to 0.1 % of sparsity. To compare the shares over
    the whole layer gives the same weights and hits the sparsity exactly.
    """
    ascending, order = scores.sort(dim=1, stable=True)
    share = ascending.cumsum(dim=1, dtype=torch.float64)
    share /= share[:, -1:].clone().clamp(min=torch.finfo(torch.float64).tiny)
    return torch.empty_like(scores).scatter_(1, order, share.to(scores.dtype))


WANDA = Metric(
    name="wanda",
    score=wanda,
    paper="Sun et al. 2023, A Simple and Effective Pruning Approach for LLMs (arXiv 2306.11695)",
    cost="one pass over the weights after the calibration forward",
    needs=frozenset({"sum_of_squares"}),
    group="row",
    options=WandaOptions,
)
