"""No reconstruction: the survivors stay as they are."""

from __future__ import annotations

from torch import Tensor

from compress.layer_statistics import LayerStatistics
from compress.methods import Options, Pruning, Reconstructed, Reconstruction


def keep(weight: Tensor, pruning: Pruning, statistics: LayerStatistics, options: Options) -> Reconstructed:
    """V = W ∘ mask. ``weight`` [N, K]."""
    assert pruning.mask is not None, "the pipeline gives a mask to every method without a metric of its own"
    return Reconstructed(weight.masked_fill(~pruning.mask, 0), pruning.mask)


NONE = Reconstruction(
    name="none",
    run=keep,
    paper="",
    cost="nothing",
)
