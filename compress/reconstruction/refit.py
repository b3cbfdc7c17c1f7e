"""Refit: the best weights for any metric's mask, with a ridge that was chosen on windows that were held out.

All pruned weights of a row are made up for together, by conjugate gradients (`compress.refit`), and how far the kept ones
may leave the dense weights is decided for each layer on a part of the calibration that the refit has not seen
(`compress.held_out`). A layer that has a bias gets the one that keeps its mean output. The mask stays.
"""

from __future__ import annotations

from torch import Tensor

from compress.held_out import RefitOptions, refitted
from compress.layer_statistics import LayerStatistics
from compress.methods import Pruning, Reconstructed, Reconstruction


def refit(weight: Tensor, pruning: Pruning, statistics: LayerStatistics, options: RefitOptions) -> Reconstructed:
    """The kept weights of ``weight`` [N, K] anew, under the given mask."""
    assert pruning.mask is not None, "the pipeline gives a mask to every method without a metric of its own"
    return refitted(weight, pruning.mask, weight * pruning.mask, statistics, options)


REFIT = Reconstruction(
    name="refit",
    run=refit,
    paper="the joint optimum of a mask, as APT's multiple removal (arXiv 2410.15567), by ALPS's conjugate gradients "
    "(arXiv 2406.07831); its ridge is chosen on held-out windows",
    cost="K² N for each of some 10 to 30 conjugate gradient steps, and as much on at most 128 to 255 rows for each of "
    "some 4 dampings; three Gram matrices [K, K] in memory",
    needs=frozenset({"split_gram"}),
    options=RefitOptions,
    corrects_bias=True,
)
