"""Bias: the survivors stay as they are, and the layer's bias takes over the mean of what was pruned.

For given weights V the bias that minimizes Σ_t ‖(x_t Wᵀ + b) − (x_t Vᵀ + b')‖² is b' = b + (W − V) x̄: the least
squares intercept. It is the second half of STADE (Coello de Portugal Mecke et al. 2025, arXiv 2503.22451), here for the mask of any
metric.
"""

from __future__ import annotations

from torch import Tensor

from compress.bias import NO_BIAS, mean_correction
from compress.layer_statistics import LayerStatistics
from compress.methods import Options, Pruning, Reconstructed, Reconstruction


def correct_bias(weight: Tensor, pruning: Pruning, statistics: LayerStatistics, options: Options) -> Reconstructed:
    """V = W ∘ mask and b_i ← b_i + Σ_{j pruned} W_ij · mean_j. ``weight`` [N, K].

    A layer without a bias gets none: its weights are pruned as by `none`, and the report says so.
    """
    assert pruning.mask is not None, "the pipeline gives a mask to every method without a metric of its own"
    pruned = weight.masked_fill(~pruning.mask, 0)
    if statistics.bias is None:
        return Reconstructed(pruned, pruning.mask, notes={"bias": NO_BIAS})
    bias = statistics.bias.float() + mean_correction(weight, pruned, statistics.moments.mean)
    return Reconstructed(pruned, pruning.mask, bias, {"bias": "corrected"})


BIAS = Reconstruction(
    name="bias",
    run=correct_bias,
    paper="Coello de Portugal Mecke et al. 2025, STADE (arXiv 2503.22451), its bias correction alone",
    cost="one product of a matrix and a vector; changes only layers that have a bias",
    needs=frozenset({"moments"}),
    corrects_bias=True,
)
