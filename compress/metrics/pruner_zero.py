"""Pruner-Zero: the metric that a genetic search over formulas of weights, gradients and activations found best."""

from __future__ import annotations

from torch import Tensor

from compress.layer_statistics import LayerStatistics
from compress.methods import Metric
from compress.metrics.gblm import GradientOptions


class PrunerZeroOptions(GradientOptions):
    pass


def pruner_zero(weight: Tensor, statistics: LayerStatistics, options: PrunerZeroOptions) -> Tensor:
    """S_ij = |W_ij| · |W_ij| · σ(G_ij), σ(G) = (G − min G) / (max G − min G) over the layer (Dong et al. 2024).

    ``weight`` [N, K] -> [N, K]. The formula is the tree that the published code prunes with. G is GBLM-Pruner's
    norm of the gradients over samples; the code writes both norms, and its scripts prune with l2. Constant factors
    of G cancel. Where all gradients of a layer are equal, 0/0 in the code, they tell nothing and σ is 1.

    The published code takes the gradients on WikiText-2's training text, here they come from the calibration.
    """
    gradient = options.gradient(statistics)
    low, high = gradient.min(), gradient.max()
    magnitude = weight.abs()
    scores = magnitude * magnitude
    return scores * ((gradient - low) / (high - low)) if bool(high > low) else scores


PRUNER_ZERO = Metric(
    name="pruner-zero",
    score=pruner_zero,
    paper="Dong et al. 2024, Pruner-Zero: Evolving Symbolic Pruning Metric from Scratch for LLMs (arXiv 2406.02924)",
    cost="a backward pass over the dense model, float32 gradients of one block in memory, all of them on disk",
    group="row",
    options=PrunerZeroOptions,
)
