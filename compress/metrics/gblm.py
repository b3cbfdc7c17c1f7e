"""GBLM-Pruner: Wanda plus the gradient of the model's loss."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.layer_statistics import LayerStatistics
from compress.methods import Metric, Options
from compress.metrics.terms import MOST_WEIGHT, sample_norm


class GradientOptions(Options):
    """Over which norm the gradients of the calibration samples are put together."""

    norm: Literal["l2", "l1"] = Field("l2", description="over samples: l2 is sqrt(Σ g²), l1 is Σ |g|")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({f"gradient_{self.norm}"})

    def gradient(self, statistics: LayerStatistics) -> Tensor:
        """The chosen one, [N, K]."""
        return statistics.gradient_l2 if self.norm == "l2" else statistics.gradient_l1


class GBLMOptions(GradientOptions):
    scale: Literal["paper", "free"] = Field(
        "paper", description="free: each of the two terms is divided by its mean over the layer before they are added"
    )
    alpha: float | None = Field(
        None, ge=0, le=MOST_WEIGHT, description="weight of the gradient; left out: 100 for paper, 1 for free"
    )


def gblm(weight: Tensor, statistics: LayerStatistics, options: GBLMOptions) -> Tensor:
    """S_ij = |W_ij| · ‖X_:j‖₂ + α · |W_ij| · ‖G_:ij‖_p (Das et al. 2023, the metric W_m).

    ``weight`` [N, K] -> [N, K]. G_n is the gradient of the mean token loss of calibration sample n, and the norm
    over samples is not divided by their number. ‖X_:j‖₂ is the root of Σ_t x_tj² / samples, as in the published code
    and in Wanda's, on which it is built: the paper's formula does not show the division, but the code has its
    α = 100 beside it. In the code α is a factor of 100 on the gradients, whose norms are stored in float16; here
    they are float32.

    So the balance of the two terms hangs on the number of samples, their length and the model. ``scale="free"``
    (not in the paper) divides each term by its mean over the layer; α is then the weight of the gradients
    against the activations. A term that is zero in the whole layer stays zero.
    """
    magnitude = weight.abs()
    activations, gradients = magnitude * sample_norm(statistics), magnitude * options.gradient(statistics)
    alpha = options.alpha
    if options.scale == "free":
        alpha = 1.0 if alpha is None else alpha
        return _over_mean(activations) + alpha * _over_mean(gradients)
    return activations + (100.0 if alpha is None else alpha) * gradients


def _over_mean(term: Tensor) -> Tensor:
    mean = float(term.mean(dtype=torch.float64))
    return term / mean if mean else term


GBLM = Metric(
    name="gblm",
    score=gblm,
    paper="Das et al. 2023, Beyond Size: How Gradients Shape Pruning Decisions in LLMs (arXiv 2311.04902)",
    cost="a backward pass over the dense model, float32 gradients of one block in memory, all of them on disk",
    needs=frozenset({"sum_of_squares"}),
    group="row",
    options=GBLMOptions,
)
