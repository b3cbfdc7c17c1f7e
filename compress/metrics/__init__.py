"""One file a metric: which weights matter. See `compress.methods` for the shape of one."""

from compress.methods import Metric
from compress.metrics.gblm import GBLM
from compress.metrics.magnitude import MAGNITUDE
from compress.metrics.pruner_zero import PRUNER_ZERO
from compress.metrics.random import RANDOM
from compress.metrics.ria import RIA
from compress.metrics.stade import STADE, STADE_W
from compress.metrics.stochria import STOCHRIA
from compress.metrics.symwanda import SYMWANDA
from compress.metrics.wanda import WANDA
from compress.metrics.wanda_plus_plus import WANDA_PLUS_PLUS

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        RANDOM,
        MAGNITUDE,
        WANDA,
        RIA,
        STADE,
        STADE_W,
        SYMWANDA,
        STOCHRIA,
        GBLM,
        PRUNER_ZERO,
        WANDA_PLUS_PLUS,
    )
}

__all__ = [
    "GBLM",
    "MAGNITUDE",
    "METRICS",
    "PRUNER_ZERO",
    "RANDOM",
    "RIA",
    "STADE",
    "STADE_W",
    "STOCHRIA",
    "SYMWANDA",
    "WANDA",
    "WANDA_PLUS_PLUS",
]
