"""Intervals and significance: against what statistics promises of them, simulated."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import pytest
from scipy import stats

from serve.measure import pooled, statistics
from serve.measure.compare import compared
from serve.measure.contrast import Contrast
from serve.measure.documents import Figure, Side
from serve.measure.requests import percentile
from serve.measure.significance import adjusted
from serve.measure.statistics import STATISTICS, interval, ratio_interval, ratio_of, value_of


@pytest.fixture
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """A simulation compares many hundred times."""
    monkeypatch.setattr(statistics, "RESAMPLES", 999)


def verdict(a: np.ndarray, b: np.ndarray, statistic: str, *, paired: bool) -> str:
    """What `halve compare` says of two lists of samples of which less is better."""

    def side(samples: np.ndarray) -> Side:
        return Side("a side", "eval", {"figure": figure(samples.tolist(), statistic, paired=paired)})

    return compared(side(a), side(b))["figure"]["verdict"]


def figure(samples: list[float], statistic: str, *, paired: bool) -> Figure:
    pairing = "the same rounds" if paired else None
    return Figure(value_of(samples, statistic), "lower", statistic, tuple(samples), pairing, True)


def significance(a: list[float], b: list[float], statistic: str, *, paired: bool) -> float | None:
    """The p value of one figure, asked alone."""
    found = Contrast(figure(a, statistic, paired=paired), figure(b, statistic, paired=paired))
    return None if found.too_few else adjusted({"figure": found})["figure"]


def verdicts(
    repeats: int, rounds: int, statistic: str, *, slower: float = 0.0, scatter: float = 0.03, paired: bool = False
) -> Iterator[str]:
    """Of repeated pairs of runs; ``slower``: by how much A really is; paired rounds share what disturbs them."""
    generator = np.random.default_rng(7)
    for _ in range(repeats):
        common = generator.normal(0, 0.2, rounds) if paired else 0.0
        a = (1 + slower) * np.exp(common + generator.normal(0, scatter, rounds))
        b = np.exp(common + generator.normal(0, scatter, rounds))
        yield verdict(a, b, statistic, paired=paired)


@pytest.mark.usefixtures("few_resamples")
@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize(("statistic", "rounds"), [("p50", 7), ("p50", 20), ("mean", 8), ("mean", 20)])
def test_two_runs_of_the_same_thing_are_the_same(statistic: str, rounds: int, paired: bool) -> None:
    found = list(verdicts(300, rounds, statistic, paired=paired))
    assert found.count("no difference") >= 0.95 * len(found)


@pytest.mark.usefixtures("few_resamples")
def test_runs_with_outliers_are_the_same() -> None:
    """Times are not normal: most are alike, and some are much longer."""
    generator = np.random.default_rng(3)
    found = [
        verdict(1 + generator.pareto(2.5, 20), 1 + generator.pareto(2.5, 20), statistic, paired=False)
        for statistic in ("p50", "mean")
        for _ in range(150)
    ]
    assert found.count("no difference") >= 0.95 * len(found)


@pytest.mark.usefixtures("few_resamples")
@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize(("scatter", "rounds"), [(0.01, 8), (0.03, 30), (0.05, 70)])
def test_a_regression_of_5_percent_is_found_with_the_stated_rounds(scatter: float, rounds: int, paired: bool) -> None:
    told = " ".join((statistics.__doc__ or "").split())
    assert re.search(rf"with {rounds} (rounds a side )?where (their times scatter )?by {scatter * 100:.0f} %", told)
    found = list(verdicts(100, rounds, "p50", slower=0.05, scatter=scatter, paired=paired))
    assert found.count("worse") >= 0.95 * len(found)
    faster = list(verdicts(100, rounds, "p50", slower=1 / 1.05 - 1, scatter=scatter, paired=paired))
    assert faster.count("better") >= 0.95 * len(faster)


def test_the_interval_of_a_mean_is_that_of_t() -> None:
    """Where theory knows the interval, the bootstrap finds it, for few samples as for many."""
    generator = np.random.default_rng(0)
    for count in (8, 40, 400):
        widths = []
        for _ in range(20):
            samples = generator.normal(3, 0.5, count)
            found = interval(samples.tolist(), "mean")
            assert found is not None
            expected = stats.ttest_1samp(samples, 0).confidence_interval(0.95)
            widths.append((found.high - found.low) / (expected.high - expected.low))
        assert np.mean(widths) == pytest.approx(1, abs=0.06)


def test_a_perplexity_covers_the_truth() -> None:
    """In 95 of 100 texts, the interval holds the perplexity of all texts."""
    generator = np.random.default_rng(1)
    held = 0
    for _ in range(300):
        found = interval(generator.normal(3, 0.3, 40).tolist(), "exp_mean")
        assert found is not None
        held += not found.misses(np.exp(3))
    assert held / 300 == pytest.approx(0.95, abs=0.03)


def test_pairs_see_what_single_samples_do_not() -> None:
    """Windows differ far more than models; drawn together, 1 % shows."""
    generator = np.random.default_rng(2)
    dense = generator.normal(3, 0.3, 40)
    sparse = dense + 0.01 + generator.normal(0, 0.005, 40)
    paired = ratio_interval(sparse.tolist(), dense.tolist(), "exp_mean", paired=True)
    single = ratio_interval(sparse.tolist(), dense.tolist(), "exp_mean", paired=False)
    assert paired is not None
    assert single is not None
    # exp of the t interval of the differences
    low, high = np.exp(stats.ttest_1samp(sparse - dense, 0).confidence_interval(0.95))
    assert paired == pytest.approx((low, high), abs=4e-4)
    assert paired.misses(1)
    assert not single.misses(1)
    assert single.high - single.low > 20 * (paired.high - paired.low)
    p = significance(sparse.tolist(), dense.tolist(), "exp_mean", paired=True)
    assert p is not None
    assert p < 0.001


def test_few_rounds_are_counted_out() -> None:
    """Of seven pairs there are 128 assignments, so that p is a fraction that can be written down."""
    a, b = [2.0, 3, 4, 5, 6, 7, 8], [1.0, 2, 3, 4, 5, 6, 7]
    assert significance(a, b, "mean", paired=True) == pytest.approx(2 / 128)
    assert significance(a[:6], b[:6], "mean", paired=True) is None
    assert ratio_interval(a[:6], b[:6], "mean", paired=True) is None
    assert interval(a[:6], "mean") is None


def test_percentiles_need_a_tail() -> None:
    samples = np.random.default_rng(0).exponential(1, 500).tolist()
    alone = [[sample] for sample in samples]
    assert pooled.interval(alone[:49], "p90") is None
    assert pooled.interval(alone[:50], "p90") is not None
    assert pooled.interval(alone[:499], "p99") is None
    assert pooled.interval(alone, "p99") is not None
    assert pooled.interval([samples[:250], samples[250:]], "p90") is None  # two rounds, however many requests they have
    for percent in (50, 90, 99):
        assert percentile(samples, percent) == np.percentile(samples, percent)


@pytest.mark.usefixtures("few_resamples")
def test_percentiles_of_rounds_that_share_a_mood() -> None:
    """The interval of a pooled percentile holds the truth, which that of requests drawn one by one does not."""
    generator = np.random.default_rng(4)
    truth = np.percentile(np.exp(generator.normal(0, 0.2, (20000, 1)) + generator.normal(0, 0.2, (20000, 40))), 90)
    missed = {"rounds": 0, "requests": 0}
    for _ in range(60):
        rounds = np.exp(generator.normal(0, 0.2, (40, 1)) + generator.normal(0, 0.2, (40, 20))).tolist()
        for name, units in (("rounds", rounds), ("requests", [[value] for one in rounds for value in one])):
            found = pooled.interval(units, "p90")
            assert found is not None
            missed[name] += found.misses(float(truth))
    assert missed["rounds"] <= 7
    assert missed["requests"] > 12


def test_percentiles_through_failures() -> None:
    """What failed is longer than all the rest, and a percentile among it is not defined."""
    answered = [float(value) for value in range(1, 10)]
    assert percentile([*answered, np.inf], 50) == np.median([*answered, 1e9])
    assert percentile([*answered, np.inf], 90) == np.inf  # it lies between the last answer and the failure
    assert percentile([*answered, 10.0, np.inf], 90) == 10  # it is the last answer
    assert percentile([np.inf], 50) == np.inf


def test_rounds_in_which_neither_side_had_any_leave_the_ratio_to_the_others() -> None:
    a, b = [3.0, 3, 3, 0, 3, 3, 3, 3], [1.5, 1.5, 1.5, 0, 1.5, 1.5, 1.5, 1.5]
    assert ratio_of(a, b, "p50", paired=True) == 2
    found = ratio_interval(a, b, "p50", paired=True)
    assert found is not None
    assert 1 <= found.low <= found.high == 2


def test_the_family_is_asked_as_one() -> None:
    """Westfall and Young's step-down maxT, written as in their algorithm 4.1, over all 256 swaps of eight pairs."""
    generator = np.random.default_rng(6)
    apart = generator.normal(0, 1, (5, 8)) + np.array([4.0, 0.8, 0, 0, 0])[:, None]
    asked = {
        f"figure {index}": Contrast(*(figure(side, "mean", paired=True) for side in (one.tolist(), [0.0] * 8)))
        for index, one in enumerate(apart)
    }
    signs = np.array([[1 - 2 * (number >> bit & 1) for bit in range(8)] for number in range(256)])
    # (sums of squares do not change with the signs, so this is in the order of |t|)
    sizes = np.abs(np.stack([signs @ one / np.sqrt((one**2).sum()) for one in apart]))
    measured, expected, last = sizes[:, 0], {}, 0.0
    order = sorted(range(5), key=lambda index: -measured[index])
    for place, index in enumerate(order):
        at_least = [max(sizes[other, draw] for other in order[place:]) >= measured[index] - 1e-9 for draw in range(256)]
        last = max(last, np.mean(at_least).item())
        expected[f"figure {index}"] = last
    assert adjusted(asked) == pytest.approx(expected)


def test_one_disturbed_round_does_not_hide_a_difference() -> None:
    generator = np.random.default_rng(8)
    b = np.exp(generator.normal(0, 0.2, 10))
    a = 1.05 * b * np.exp(generator.normal(0, 0.01, 10))
    a[3] *= 2
    assert verdict(a, b, "p50", paired=True) == "worse"
    assert verdict(b, a, "p50", paired=True) == "better"


def test_equal_samples_are_equal() -> None:
    ones = [1.0] * 10
    for paired in (False, True):
        assert ratio_interval(ones, ones, "mean", paired=paired) == (1, 1)
        assert significance(ones, ones, "mean", paired=paired) == 1


def test_a_ratio_to_nothing_has_no_interval() -> None:
    assert ratio_interval([1.0] * 8, [0.0] * 8, "mean", paired=True) is None
    assert ratio_interval([0.0] * 8, [0.0] * 8, "mean", paired=False) is None
    # Eight coin flips: some of the resamples hold no success at all.
    assert ratio_interval([1.0] * 8, [0.0] * 7 + [1.0], "mean", paired=False) is None


def test_few_successes_still_have_an_interval() -> None:
    """Of 25 examples with 8 successes, one resample in 15,000 has none: that says nothing about the ratio."""
    successes = [1.0] * 8 + [0.0] * 17
    assert ratio_interval(successes, successes, "mean", paired=True) == (1, 1)
    better = [1.0] * 12 + [0.0] * 13
    found = ratio_interval(better, successes, "mean", paired=True)
    assert found is not None
    assert 1 <= found.low < 1.5 < found.high < 4


def test_nothing_is_random() -> None:
    samples = np.random.default_rng(0).normal(3, 1, 20).tolist()
    for name in STATISTICS:
        assert interval(samples, name) == interval(samples, name)
