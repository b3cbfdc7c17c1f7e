"""Magnitude: a weight matters as much as it is large."""

from __future__ import annotations

from torch import Tensor

from compress.layer_statistics import LayerStatistics
from compress.methods import Metric, Options


def magnitude(weight: Tensor, statistics: LayerStatistics | None = None, options: Options | None = None) -> Tensor:
    """S_ij = |W_ij|. ``weight`` [N, K] -> [N, K]; no data are used.

    A run still reads the calibration, for the errors that it reports.
    """
    return weight.abs()


MAGNITUDE = Metric(
    name="magnitude",
    score=magnitude,
    paper="Han et al. 2015, Learning both Weights and Connections (arXiv 1506.02626)",
    cost="one pass over the weights; the calibration is read for the errors in the report alone",
    group="layer",
)
