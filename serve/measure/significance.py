"""Whether figures differ: a permutation test of all figures of a comparison at once.

A comparison of three loads asks of 57 figures. If each were asked at 5 %, two equal things would nearly always differ in one
of them. So the question is that of the whole: of two equal things, at most 5 in 100 comparisons find any difference. This is
the step-down maxT procedure of Westfall and Young ("Resampling-Based Multiple Testing", 1993, algorithm 4.1): under each
permutation all figures are computed, each by its own scale, and a figure's p value is the share of permutations in which the
largest of all figures is as large as it. As the same permutation serves all figures, what goes together (a median and a mean
of the same times) costs nothing, where Bonferroni's and Holm's corrections would make eight rounds useless.

Permuted is what would be exchangeable if the two were equal: the sides of each pair (the same round, window or example), or,
where there are no pairs, which side a sample belongs to. It keeps its promise for any distribution and any number of samples.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import NamedTuple, Protocol

import numpy as np

from serve.measure import statistics

SIGNIFICANT = 0.04
"""Of comparisons of two equal things, at most this share finds a difference in any figure: below 5 %, which is promised."""


class Units(NamedTuple):
    """What is permuted: signs of ``a`` pairs, or ``a`` and ``b`` samples among each other. Figures of one are permuted as one."""

    of: Hashable
    paired: bool
    a: int
    b: int


class Question(Protocol):
    """A figure of two sides."""

    @property
    def units(self) -> Units: ...

    def differences(self, draws: np.ndarray) -> np.ndarray:
        """The difference [draws] under each permutation.

        ``draws``: [draws, pairs] of 1 and -1 (the two sides of the pair change places), or [draws, a + b] of 1 (it counts
        as a sample of A) and 0 (of B).
        """
        ...


def adjusted(questions: Mapping[str, Question]) -> dict[str, float]:
    """The p value of each figure, adjusted for all of them."""
    if not questions:
        return {}
    groups = list(dict.fromkeys(question.units for question in questions.values()))
    draws = _draws(groups)
    found = np.stack([question.differences(draws[question.units]) for question in questions.values()], axis=1)
    scale = found.std(axis=0)
    sizes = np.abs(found) / np.where(scale > 0, scale, 1.0)
    largest_first = np.argsort(-sizes[0], kind="stable")
    # Of a figure, the largest of it and of those that are less clear than it; then no p value below a clearer one's.
    reached = np.maximum.accumulate(sizes[:, largest_first[::-1]], axis=1)[:, ::-1]
    as_large = reached >= sizes[0, largest_first] * (1 - 1e-9)
    values = np.maximum.accumulate(as_large.mean(axis=0))
    names = list(questions)
    return {names[index]: float(value) for index, value in zip(largest_first, values, strict=True)}


def _draws(groups: list[Units]) -> dict[Units, np.ndarray]:
    """As many permutations of each group; the first is what was measured."""
    most = statistics.RESAMPLES
    if len(groups) == 1 and groups[0].paired and 2 ** groups[0].a <= most:
        numbers = np.arange(2 ** groups[0].a)[:, None]  # bit for bit, which pairs change places; none in the first
        return {groups[0]: 1 - 2 * (numbers >> np.arange(groups[0].a) & 1)}
    rng = np.random.default_rng(statistics.SEED)
    return {group: _random(group, most // 5, rng) for group in groups}  # (a p value of three digits does)


def _random(group: Units, count: int, rng: np.random.Generator) -> np.ndarray:
    if group.paired:
        signs = rng.integers(0, 2, (count, group.a), dtype=np.int8) * 2 - 1
        return np.vstack([np.ones(group.a, dtype=np.int8), signs])
    measured = np.repeat(np.array([1, 0], dtype=np.int8), [group.a, group.b])
    return np.vstack([measured, rng.permuted(np.tile(measured, (count, 1)), axis=1)])
