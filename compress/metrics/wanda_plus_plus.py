"""Wanda++: Wanda plus the gradient of the decoder block's output."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from compress.layer_statistics import LayerStatistics
from compress.methods import Metric, Options
from compress.metrics.terms import MOST_WEIGHT, sample_norm


class WandaPlusPlusOptions(Options):
    alpha: float = Field(100.0, ge=0, le=MOST_WEIGHT, description="weight of the gradient")


def wanda_plus_plus(weight: Tensor, statistics: LayerStatistics, options: WandaPlusPlusOptions) -> Tensor:
    """S_ij = (α G_ij + ‖X_:j‖₂) · |W_ij|, the regional gradient score (Yang et al. 2025). ``weight`` [N, K] -> [N, K].

    G is the root mean square over calibration samples of ∂‖block output‖₂ / ∂W, a gradient that never leaves the
    decoder block. ‖X_:j‖₂ is a root mean over samples, too, as in Wanda's code, so that more samples do not change the
    balance. The authors published no code; an unofficial one takes the norm over all samples instead, which
    is what α / √samples gives here.

    This is the score alone. Wanda++'s regional optimization, which trains the block between prunings, is not part
    of it.
    """
    return (options.alpha * statistics.regional_gradient + sample_norm(statistics)) * weight.abs()


WANDA_PLUS_PLUS = Metric(
    name="wanda++",
    score=wanda_plus_plus,
    paper="Yang et al. 2025, Wanda++: Pruning LLMs via Regional Gradients (arXiv 2503.04992), without its optimization",
    cost="a backward pass within each decoder block, one sample at a time; float32 gradients of one block in memory",
    needs=frozenset({"sum_of_squares", "regional_gradient"}),
    group="row",
    options=WandaPlusPlusOptions,
)
