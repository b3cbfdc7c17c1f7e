"""One file a metric: which weights matter. See `compress.methods` for the shape of one."""

from compress.methods import Metric
from compress.metrics.magnitude import MAGNITUDE
from compress.metrics.wanda import WANDA

METRICS: dict[str, Metric] = {metric.name: metric for metric in (MAGNITUDE, WANDA)}

__all__ = ["MAGNITUDE", "METRICS", "WANDA"]
