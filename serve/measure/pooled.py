"""Percentiles of all requests together, with intervals that come from their rounds.

A tail percentile of a round of a few requests is about its slowest one, and a median of such values is no percentile of
anything. So the requests of all rounds are pooled. But requests of one round shared the machine's mood and waited for one
another: what is drawn again is whole rounds (the cluster bootstrap: Davison and Hinkley, "Bootstrap Methods and Their
Application", 1997, section 3.8). A request that failed is infinite (`requests`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from serve.measure import statistics
from serve.measure.statistics import FEWEST, Interval

TAILS = {"p90": 90, "p99": 99}
Rounds = Sequence[Sequence[float]]


def too_few(rounds: Rounds, statistic: str) -> str | None:
    """Why there is no interval of a percentile of these rounds, or None where there is one.

    The tail that the percentile cuts off has to hold five requests, or resampling sees only the same few extremes.
    """
    requests, fewest = sum(map(len, rounds)), math.ceil(500 / (100 - TAILS[statistic]))
    if requests < fewest:
        return f"{requests} samples, and it takes {fewest}"
    return f"{len(rounds)} rounds, and it takes {FEWEST}" if len(rounds) < FEWEST else None


class Pool:
    """The values of several rounds together, of which each round may count several times, or not at all."""

    def __init__(self, rounds: Rounds, statistic: str) -> None:
        values = np.concatenate([np.asarray(one, dtype=np.float64) for one in rounds])
        owners = np.repeat(np.arange(len(rounds)), [len(one) for one in rounds])
        order = np.argsort(values, kind="stable")
        self._values, self._percent = values[order], TAILS[statistic]
        # [values, rounds]: how many values of each round there are up to a value, in their order
        self._up_to = np.cumsum(owners[order][:, None] == np.arange(len(rounds)), axis=0, dtype=np.int32)

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        """The percentile [draws] where each round counts as often as ``weights`` [draws, rounds] says."""
        wanted = self._percent * (weights @ self._up_to[-1])
        low, high = np.zeros(len(weights), dtype=np.intp), np.full(len(weights), len(self._values) - 1)
        while (low < high).any():  # the first value up to which there are enough, by bisection
            middle = (low + high) // 2
            enough = 100 * np.einsum("dr,dr->d", weights, self._up_to[middle]) >= wanted
            low, high = np.where(enough, low, middle + 1), np.where(enough, middle, high)
        return self._values[low]


def interval(rounds: Rounds, statistic: str) -> Interval | None:
    """Of a percentile of all requests; None where they are too few, or where it may lie among those that failed."""
    if too_few(rounds, statistic):
        return None
    pool = Pool(rounds, statistic)
    return _bounds(lambda draw: pool(draw(len(rounds))), len(rounds))


def ratio_interval(a: Rounds, b: Rounds, statistic: str, *, paired: bool) -> Interval | None:
    """Of the percentile of ``a`` to that of ``b``; ``paired``: the rounds belong together one by one."""
    if too_few(a, statistic) or too_few(b, statistic):
        return None
    above, below = Pool(a, statistic), Pool(b, statistic)

    def ratio(draw: _Draw) -> np.ndarray:
        first = draw(len(a))
        return above(first) / below(first if paired else draw(len(b)))

    return _bounds(ratio, min(len(a), len(b)))


def relative_ratio_interval(
    a: Rounds, own: Rounds, b: Rounds, others: Rounds, statistic: str
) -> Interval | None:  # fmt: skip
    """Of (``a`` to ``own``) to (``b`` to ``others``): the rounds of ``a`` and ``own`` are paired, and so are the other two."""
    if any(too_few(one, statistic) for one in (a, own, b, others)):
        return None
    pools = [Pool(one, statistic) for one in (a, own, b, others)]

    def ratio(draw: _Draw) -> np.ndarray:
        first, second = draw(len(a)), draw(len(b))
        return pools[0](first) / pools[1](first) / (pools[2](second) / pools[3](second))

    return _bounds(ratio, min(len(a), len(b)))


_Draw = Callable[[int], np.ndarray]


def _bounds(of: Callable[[_Draw], np.ndarray], fewest: int) -> Interval | None:
    rng = np.random.default_rng(statistics.SEED)

    def draw(rounds: int) -> np.ndarray:
        return rng.multinomial(rounds, np.full(rounds, 1 / rounds), size=statistics.RESAMPLES)

    with np.errstate(divide="ignore", invalid="ignore"):
        found = of(draw)
    tail = (1 - statistics.expanded(fewest)) / 2
    # (inverted_cdf: between infinities there is nothing to interpolate)
    low, high = np.quantile(found, [tail, 1 - tail], method="inverted_cdf")
    return Interval(float(low), float(high)) if math.isfinite(low) and math.isfinite(high) else None
