"""STADE: a weight matters as much as what it carries beyond a constant, which the layer's bias can take over.

If the bias is free, deleting w_ij costs min_b E[(w_ij x_j − b)²] = w_ij² Var(x_j), with b = w_ij E[x_j]. **Without a
bias** it costs w_ij² (Var(x_j) + E[x_j]²), which is Wanda's score. A layer that has no bias (all of most Llama-like
models) is scored by the variance all the same, as in the published code, and nothing then takes the mean over: the
report says so of each, and the run warns. ``--add-bias`` gives layers one where the model's config.json has a switch for
it; elsewhere wanda is the score that fits.
"""

from __future__ import annotations

from torch import Tensor

from compress.layer_statistics import LayerStatistics
from compress.methods import Metric, Options
from compress.metrics.wanda import wanda

_PAPER = "Coello de Portugal Mecke et al. 2025, STADE: Standard Deviation as a Pruning Metric (arXiv 2503.22451)"


def stade(weight: Tensor, statistics: LayerStatistics, options: Options | None = None) -> Tensor:
    """S_ij = |W_ij| · std(x_j), the root of the paper's W_ij² Var(x_j). ``weight`` [N, K] -> [N, K].

    The root has the same order, and no square of a small weight that could underflow. The variance is the
    unbiased one over all calibration tokens; of a single token it is 0.

    The paper's bias b_i ← b_i + Σ_pruned W_ij E[x_j] comes after the reconstruction, from the dense weights
    (``corrects_bias``). The published code zeroes the weights in place first, so that its correction is always
    0; this follows the paper. A layer without a bias gets none, and the score is beside its premise (see above).
    """
    return weight.abs() * statistics.moments.variance.sqrt().float()


def stade_w(weight: Tensor, statistics: LayerStatistics, options: Options | None = None) -> Tensor:
    """Wanda where the input comes straight from a normalization, STADE elsewhere. ``weight`` [N, K] -> [N, K].

    The paper's mixed variant, STADE-W. The published code tells the two kinds of layer by their names in LLaMA and
    OPT; here it is told by what the model computes. Scores are compared within one layer only, so the two forms
    need no common scale. The bias is corrected in both kinds: it is the best bias whatever chose the mask.
    """
    return wanda(weight, statistics) if statistics.after_norm else stade(weight, statistics)


STADE = Metric(
    name="stade",
    score=stade,
    paper=_PAPER,
    cost="one pass over the weights after the calibration forward",
    needs=frozenset({"moments"}),
    group="row",
    corrects_bias=True,
)

STADE_W = Metric(
    name="stade-w",
    score=stade_w,
    paper=f"{_PAPER}, variant STADE-W",
    cost="one pass over the weights after the calibration forward",
    needs=frozenset({"moments", "sum_of_squares", "after_norm"}),
    group="row",
    corrects_bias=True,
)
