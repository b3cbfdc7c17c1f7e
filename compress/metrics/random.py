"""Random: no weight matters more than another. What every other metric has to beat."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.layer_statistics import LayerStatistics
from compress.methods import Metric, Options


def random(weight: Tensor, statistics: LayerStatistics, options: Options | None = None) -> Tensor:
    """Uniform scores. ``weight`` [N, K] -> [N, K].

    Drawn on the CPU from the layer's own seed, so that a recipe prunes the same weights on every device.
    """
    return torch.rand(weight.shape, generator=statistics.generator()).to(weight.device)


RANDOM = Metric(
    name="random",
    score=random,
    paper="the baseline of pruning papers, such as Gale et al. 2019, The State of Sparsity (arXiv 1902.09574)",
    cost="one random number a weight; the calibration is read for the errors in the report alone",
    group="layer",
)
