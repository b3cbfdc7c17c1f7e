"""One figure of two sides: the ratio, its interval, and what `significance` asks of it.

Rounds of one run are pairs, and what disturbs a round disturbs both sides of it. Rounds of two runs are not: the machine of
one day is not that of the other, however alike the rounds of each are. Where both runs measured the same dense model beside
theirs, it is what they are compared by: the ratio is that of sparse / dense in one run to sparse / dense in the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from serve.measure import pooled
from serve.measure.documents import Figure
from serve.measure.pooled import TAILS, Pool
from serve.measure.significance import Units
from serve.measure.statistics import FEWEST, Interval, quotients, ratio_interval, ratio_of


@dataclass(frozen=True)
class Contrast:
    """``a`` beside ``b``, which have one statistic; ``own``, ``others``: the dense side of A's run and of B's."""

    a: Figure
    b: Figure
    own: Figure | None = None
    others: Figure | None = None

    @property
    def relative(self) -> bool:
        return self.own is not None and self.others is not None

    @property
    def paired(self) -> bool:
        return self.a.pairing is not None and self.a.pairing == self.b.pairing and self.a.units == self.b.units

    @property
    def units(self) -> Units:
        return Units((self.a.pairing, self.b.pairing), self.paired, self.a.units, self.b.units)

    @property
    def counts(self) -> list[int]:
        """Samples of A and of B."""
        if self._tail:
            return [sum(map(len, figure.rounds)) for figure in (self.a, self.b)]
        return [len(side) for side in self._known]

    @property
    def too_few(self) -> str | None:
        """Why nothing can be said, or None where there are enough."""
        if self._tail:
            figures = [figure for figure in (self.a, self.b, self.own, self.others) if figure is not None]
            return next((why for f in figures if (why := pooled.too_few(f.rounds, self._statistic))), None)
        return f"{min(self.counts)} samples, and it takes {FEWEST}" if min(self.counts) < FEWEST else None

    @property
    def ratio(self) -> float | None:
        """None where it is not defined: the baseline is 0."""
        if self._tail:
            ratio = self.a.value / self.b.value if self.b.value else None
            if ratio is None or self.own is None or self.others is None:
                return ratio
            return ratio / (self.own.value / self.others.value) if self.own.value and self.others.value else None
        a, b = self._known
        # (Where most rounds have nothing on either side, the rest of them are no ratio of the whole.)
        if not self.b.value or not min(self.counts):
            return None
        return ratio_of(a.tolist(), b.tolist(), self._statistic, paired=self.paired)

    @property
    def interval(self) -> Interval | None:
        """Of the ratio; None where there are too few samples, or it is not defined."""
        if self.too_few or self.ratio is None:
            return None
        if self._tail and self.own is not None and self.others is not None:
            return pooled.relative_ratio_interval(
                self.a.rounds, self.own.rounds, self.b.rounds, self.others.rounds, self._statistic
            )
        if self._tail:
            return pooled.ratio_interval(self.a.rounds, self.b.rounds, self._statistic, paired=self.paired)
        a, b = self._known
        return ratio_interval(a.tolist(), b.tolist(), self._statistic, paired=self.paired)

    def differences(self, draws: np.ndarray) -> np.ndarray:
        """See `significance.Question`."""
        if self._tail:
            return self._tail_differences(draws)
        a, b = self._values
        if self.paired:
            apart = _tamed(_log(quotients(a, b))) if self._statistic == "p50" else a - b
            return draws @ np.nan_to_num(apart) / len(apart)
        both = np.concatenate([a, b])
        if self._statistic == "p50":
            both = _log(both)
            both = _tamed(both - np.nanmedian(both))
        both = np.nan_to_num(both)
        return draws @ both / self.units.a - (1 - draws) @ both / self.units.b

    @property
    def _statistic(self) -> str:
        assert self.a.statistic is not None
        return "p50" if self.relative and not self._tail else self.a.statistic

    @property
    def _tail(self) -> bool:
        return self.a.statistic in TAILS

    @property
    def _values(self) -> tuple[np.ndarray, np.ndarray]:
        """One of each unit and side; NaN of a round that has none."""
        a, b = (np.asarray(figure.samples, dtype=np.float64) for figure in (self.a, self.b))
        if self.own is not None and self.others is not None:
            return quotients(a, np.asarray(self.own.samples)), quotients(b, np.asarray(self.others.samples))
        return a, b

    @property
    def _known(self) -> tuple[np.ndarray, np.ndarray]:
        a, b = self._values
        if self.paired:
            both = ~(np.isnan(a) | np.isnan(b))
            return a[both], b[both]
        return a[~np.isnan(a)], b[~np.isnan(b)]

    def _tail_differences(self, draws: np.ndarray) -> np.ndarray:
        as_a = np.hstack([1 + draws, 1 - draws]) // 2 if self.paired else draws
        sides = [Pool([*self.a.rounds, *self.b.rounds], self._statistic)]
        if self.own is not None and self.others is not None:
            sides.append(Pool([*self.own.rounds, *self.others.rounds], self._statistic))
        values = [[_log(pool(weights)) for pool in sides] for weights in (as_a, 1 - as_a)]
        with np.errstate(invalid="ignore"):  # between what failed and what failed
            found = [level[0] - level[1] if len(level) == 2 else level[0] for level in values]
            apart = found[0] - found[1]
        most = np.abs(apart[np.isfinite(apart)]).max(initial=1.0)
        return np.nan_to_num(apart, nan=0.0, posinf=2 * most, neginf=-2 * most)


def _log(values: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(values)


def _tamed(apart: np.ndarray) -> np.ndarray:
    """Differences, of which none counts for more than twice the median one: Huber's weights, at 1.35 standard deviations.

    One disturbed round would else hide a difference that all of the others show. It depends on the sizes of the differences
    only, so that permutations stay exact.
    """
    sizes = np.abs(apart[~np.isnan(apart)])
    if not sizes.any():
        return apart
    most = 2 * np.median(sizes[sizes > 0])
    return np.clip(apart, -most, most) if np.isfinite(most) else np.sign(apart)
