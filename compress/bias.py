"""The mean of what pruning takes out of a layer's output goes into its bias."""

from __future__ import annotations

from torch import Tensor

NO_BIAS = "the layer has none to correct"
"""What a layer's record says under "bias" where a method would have corrected it."""


def mean_correction(dense: Tensor, pruned: Tensor, mean: Tensor) -> Tensor:
    """Σ_j (W_ij − V_ij) · mean_j, [N] float32: what has to be added to the bias so that the mean output stays.

    The bias that minimizes the squared output error for given weights (STADE, arXiv 2503.22451; for V = W ∘ mask it
    is the sum over the pruned weights). ``dense`` W and ``pruned`` V [N, K], ``mean`` of the input [K].
    """
    return ((dense - pruned).double() @ mean.double()).float()
