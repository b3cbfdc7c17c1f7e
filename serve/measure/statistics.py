"""Intervals by the bootstrap, of statistics of samples that are drawn one by one: windows, examples, rounds.

The resampling is `scipy.stats.bootstrap` with the percentile method. On few samples that interval is too narrow,
so it is widened as Hesterberg does ("What Teachers Should Know About the Bootstrap", The American Statistician
69(4), 2015, section 4.3, "expanded percentile interval"): the percentiles are those that a t interval of n samples
would have. Whether a difference is real is asked of all figures of a comparison at once (`significance`); the tails of
requests are another matter (`pooled`). Nothing here is random: the generator has a fixed seed.

How many rounds a comparison takes: a change of the median by 5 % is found 19 times in 20 with 8 rounds a side where
their times scatter by 1 %, with 30 where by 3 %, and with 70 where by 5 % (`tests/serve/test_statistics.py`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
RESAMPLES = 9999
FEWEST = 7
"""Fewer samples cannot tell: six differences of two equal things have one sign in one case of 32."""
_BATCH = 4_000_000  # resampled values in memory at once
SEED = 20240607


class Interval(NamedTuple):
    """What holds the true value in 95 of 100 measurements."""

    low: float
    high: float

    def misses(self, value: float) -> bool:
        return not self.low <= value <= self.high


STATISTICS: dict[str, Callable[..., np.ndarray]] = {
    "mean": lambda x, axis=-1: np.mean(x, axis=axis),
    "exp_mean": lambda x, axis=-1: np.exp(np.mean(x, axis=axis)),
    "exp_minus_mean": lambda x, axis=-1: np.exp(-np.mean(x, axis=axis)),
    "p50": lambda x, axis=-1: np.median(x, axis=axis),
}
"""Each maps samples [..., n] along an axis."""


def value_of(samples: Sequence[float], statistic: str) -> float:
    """The statistic of samples [n]."""
    return float(STATISTICS[statistic](np.asarray(samples, dtype=np.float64)))


def interval(samples: Sequence[float], statistic: str) -> Interval | None:
    """Of a statistic of samples [n]; None where they are too few, or it may be infinite."""
    if len(samples) < FEWEST:
        return None
    found = _bootstrap((np.asarray(samples, dtype=np.float64),), STATISTICS[statistic], paired=False)
    return found if math.isfinite(found.low) and math.isfinite(found.high) else None


def ratio_of(a: Sequence[float], b: Sequence[float], statistic: str, *, paired: bool) -> float | None:
    """statistic(a) / statistic(b), or for the median of pairs, the median of their ratios; None where it is not defined.

    What slows both sides of a round down (a machine's phase) leaves their ratio as it is, but not two medians.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        found = float(_ratio(statistic, paired)(np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)))
    return found if math.isfinite(found) else None


def ratio_interval(a: Sequence[float], b: Sequence[float], statistic: str, *, paired: bool) -> Interval | None:
    """Of `ratio_of`; None where the samples are too few, or the ratio is not defined.

    Args:
        paired: the samples belong together one by one (the same windows, examples, rounds): they are drawn together.
    """
    if min(len(a), len(b)) < FEWEST:
        return None
    if ratio_of(a, b, statistic, paired=paired) is None:
        return None
    ratio = _ratio(statistic, paired)

    def of_resamples(x: np.ndarray, y: np.ndarray, axis: int = -1) -> np.ndarray:
        found = ratio(x, y, axis=axis)
        return np.where(np.isnan(found), 1.0, found)  # 0 / 0: among few examples, no success on either side

    samples = (np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64))
    with np.errstate(divide="ignore", invalid="ignore"):
        found = _bootstrap(samples, of_resamples, paired=paired)
    return found if math.isfinite(found.low) and math.isfinite(found.high) else None


def quotients(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """x / y, one by one; 1 where both are 0, or both without end: nothing tells them apart."""
    with np.errstate(divide="ignore", invalid="ignore"):
        same = (x == y) & ((x == 0) | np.isinf(x))
        return np.where(same, 1.0, x / y)


def _ratio(statistic: str, paired: bool) -> Callable[..., np.ndarray]:
    of = STATISTICS[statistic]
    if statistic == "p50" and paired:
        return lambda x, y, axis=-1: of(quotients(x, y), axis=axis)
    return lambda x, y, axis=-1: of(x, axis=axis) / of(y, axis=axis)


def _bootstrap(samples: tuple[np.ndarray, ...], statistic: Callable[..., np.ndarray], *, paired: bool) -> Interval:
    fewest = min(len(sample) for sample in samples)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # of ratios to 0; the caller sees the NaN
        found = _resampled(samples, statistic, paired, fewest)
    return Interval(float(found.low), float(found.high))


def _resampled(samples: tuple[np.ndarray, ...], statistic: Callable[..., np.ndarray], paired: bool, fewest: int) -> Any:
    return stats.bootstrap(
        samples,
        statistic,
        n_resamples=RESAMPLES,
        batch=max(1, _BATCH // max(len(sample) for sample in samples)),
        vectorized=True,
        paired=paired,
        confidence_level=expanded(fewest),
        method="percentile",
        rng=np.random.default_rng(SEED),
    ).confidence_interval


def expanded(n: int) -> float:
    """The level whose percentiles lie as far out as a t interval of n samples."""
    reach = math.sqrt(n / (n - 1)) * float(stats.t.ppf(0.5 + CONFIDENCE / 2, n - 1))
    return 1 - 2 * float(stats.norm.sf(reach))
