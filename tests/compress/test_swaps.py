"""Swaps against brute force in float64: the formula, the descent, and that nothing is left to swap at the end."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.methods import Pruning, Reconstructed
from compress.metrics.magnitude import magnitude
from compress.patterns import Group, NMPattern, Pattern, UnstructuredPattern, parse_pattern
from compress.reconstruction.swaps import SWAPS, SwapsOptions, _costs, _start, _with_best_partner, swaps
from tests.compress.layers import gathered, layer

WINDOW = 128


pytestmark = pytest.mark.usefixtures("one_thread")


def run(
    weight: Tensor, x: Tensor, pattern: Pattern, group: Group = "row", mask: Tensor | None = None, sweeps: int = 200
) -> tuple[Tensor, Reconstructed]:
    """The mask at the start (of magnitude, so that there is much to mend), and the result."""
    scores = magnitude(weight)
    mask = pattern.mask(scores, group) if mask is None else mask
    before = mask.clone()
    result = swaps(weight, Pruning(pattern, group, mask, scores), gathered(x), SwapsOptions(max_sweeps=sweeps))
    assert torch.equal(mask, before)
    assert torch.equal(result.weight, weight * result.mask)
    return before, result


def losses(weight: Tensor, mask: Tensor, gram: Tensor) -> Tensor:
    """r H rᵀ of each row, float64. Of the float32 Gram matrix: it is the problem that was posed."""
    lost = (weight * ~mask).double()
    return torch.einsum("ni,ij,nj->n", lost, gram.double(), lost)


def pairs(mask: Tensor, row: int, size: int) -> Iterator[tuple[int, int]]:
    """(p, u) of a row: kept and pruned columns in the same ``size`` columns."""
    columns = mask.shape[1]
    for start in range(0, columns, size):
        members = range(start, min(start + size, columns))
        for p, u in itertools.product(members, members):
            if mask[row, p] and not mask[row, u]:
                yield p, u


def slack(weight: Tensor, gram: Tensor, row: int) -> float:
    """The unit in which float32 sees the changes of a row's loss."""
    norm = (weight[row].double() ** 2 * gram.diagonal().double()).sqrt()
    return float(1e-6 * norm.max() * norm.sum())


def assert_local_optimum(weight: Tensor, mask: Tensor, gram: Tensor, size: int) -> None:
    """No pair, tried by brute force, lowers the loss by more than float32 can tell."""
    start = losses(weight, mask, gram)
    for row in range(len(weight)):
        found = list(pairs(mask, row, size))
        tried = mask[row].repeat(len(found), 1)
        for at, (p, u) in enumerate(found):
            tried[at, p], tried[at, u] = False, True
        after = losses(weight[row].expand(len(found), -1), tried, gram)
        if found:
            assert float(after.min() - start[row]) >= -slack(weight, gram, row)


def size_of(pattern: Pattern) -> int:
    return pattern.m if isinstance(pattern, NMPattern) else WINDOW


@pytest.mark.parametrize(("pattern", "columns"), [("2:4", 12), ("4:8", 16), ("1:4", 8), ("3:12", 24)])
def test_the_formula_is_the_difference_of_losses(pattern: str, columns: int) -> None:
    """For every pair: what the best partner of each p costs, against the loss with the two exchanged."""
    weight, x = layer(5, columns, 60)
    nm = parse_pattern(pattern)
    assert isinstance(nm, NMPattern)
    mask = nm.mask(weight.abs())
    gram = gathered(x).gram
    state = _start(weight.T.contiguous(), mask.T.contiguous(), gram)
    change = _with_best_partner(state.weight, *_costs(state), gram, nm.m)  # [K, N]
    before = losses(weight, mask, gram)
    for row in range(5):
        best: dict[int, float] = {}
        for p, u in pairs(mask, row, nm.m):
            after = mask.clone()
            after[row, p], after[row, u] = False, True
            difference = float(losses(weight, after, gram)[row] - before[row])
            best[p] = min(difference, best.get(p, float("inf")))
        for p in range(columns):
            expected = best.get(p, float("inf"))
            assert float(change[p, row]) == pytest.approx(expected, rel=1e-3, abs=slack(weight, gram, row))


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4", "3:4", "5:12"])
@pytest.mark.parametrize(("n", "k", "t"), [(1, 24, 60), (6, 72, 300), (4, 264, 600), (5, 48, 7)])
def test_nm_ends_in_a_local_optimum(pattern: str, n: int, k: int, t: int) -> None:
    weight, x = layer(n, k, t)
    nm = parse_pattern(pattern)
    before, result = run(weight, x, nm)
    gram = gathered(x).gram
    assert result.notes["swap_optimum"]
    assert_local_optimum(weight, result.mask, gram, size_of(nm))
    assert result.mask.unflatten(1, (-1, size_of(nm))).sum(dim=2).eq(nm.keep_n).all()  # type: ignore[union-attr]
    assert float(losses(weight, result.mask, gram).sum()) < float(losses(weight, before, gram).sum())


@pytest.mark.parametrize("group", ["row", "block", "layer"])
@pytest.mark.parametrize(("n", "k", "t"), [(1, 20, 60), (4, 77, 300), (3, 200, 500)])
def test_unstructured_ends_in_an_optimum_of_its_windows(group: Group, n: int, k: int, t: int) -> None:
    weight, x = layer(n, k, t)
    pattern = UnstructuredPattern(0.5)
    before, result = run(weight, x, pattern, group)
    assert result.notes["swap_optimum"]
    assert_local_optimum(weight, result.mask, gathered(x).gram, WINDOW)
    for window, old in zip(result.mask.split(WINDOW, dim=1), before.split(WINDOW, dim=1), strict=True):
        assert torch.equal(window.sum(dim=1), old.sum(dim=1))


@pytest.mark.parametrize("pattern", [NMPattern(2, 4), UnstructuredPattern(0.6)], ids=str)
def test_each_sweep_lowers_the_error_of_each_row_it_changes(pattern: Pattern) -> None:
    weight, x = layer(8, 264, 700)
    gram = gathered(x).gram
    mask, total = None, 0
    for _ in range(100):
        before, result = run(weight, x, pattern, mask=mask, sweeps=1)
        was, now = losses(weight, before, gram), losses(weight, result.mask, gram)
        changed = (before != result.mask).any(dim=1)
        assert bool((now[changed] < was[changed]).all())
        assert int(changed.sum()) <= result.notes["swaps"]
        total += result.notes["swaps"]
        mask = result.mask
        if result.notes["swap_optimum"]:
            break
    _, at_once = run(weight, x, pattern)
    assert at_once.notes["swaps"] == total  # a finished row stays finished, whether it is looked at again or not
    assert torch.equal(at_once.mask, mask)


def test_the_number_of_swaps_with_a_single_group() -> None:
    """One group, one swap: the best of the four by brute force."""
    for seed in range(10):
        weight, x = layer(3, 4, 40, seed)
        gram = gathered(x).gram
        before, result = run(weight, x, NMPattern(2, 4), sweeps=1)
        count = 0
        for row in range(3):
            options = {}
            for p, u in pairs(before, row, 4):
                mask = before.clone()
                mask[row, p], mask[row, u] = False, True
                options[p, u] = float(losses(weight, mask, gram)[row])
            (p, u), best = min(options.items(), key=lambda item: item[1])
            expected = before[row].clone()
            if best < float(losses(weight, before, gram)[row]):
                expected[p], expected[u] = False, True
                count += 1
            assert torch.equal(result.mask[row], expected)
        assert result.notes["swaps"] == count


def test_between_the_start_and_the_best_of_all_masks() -> None:
    """Three groups of 2:4 have 216 masks: never better than the best, and nearer to it than the start."""
    gaps = []
    for seed in range(20):
        weight, x = layer(1, 12, 50, seed)
        gram = gathered(x).gram
        combinations = [[i in kept for i in range(4)] for kept in itertools.combinations(range(4), 2)]
        every = torch.tensor(
            [first + second + third for first, second, third in itertools.product(combinations, repeat=3)]
        )
        best = float(losses(weight.expand(len(every), -1), every, gram).min())
        before, result = run(weight, x, NMPattern(2, 4))
        start, end = float(losses(weight, before, gram)), float(losses(weight, result.mask, gram))
        assert best * (1 - 1e-6) <= end <= start
        gaps.append((start / best, end / best))
    starts, ends = zip(*gaps, strict=True)
    assert sum(ends) / 20 < 1.25 < 1.5 < sum(starts) / 20


def test_zero_rows_dead_inputs_and_ties() -> None:
    weight, x = layer(6, 40, 200)
    weight[2] = 0
    weight[4] = 1
    x[:, [0, 1, 2, 3, 9]] = 0
    before, result = run(weight, x, NMPattern(2, 4))
    assert torch.equal(result.mask[2], before[2])
    assert_local_optimum(weight, result.mask, gathered(x).gram, 4)


def test_nothing_to_gain() -> None:
    """No input at all; and equal, uncorrelated inputs with equal weights, where all masks are alike."""
    for x in (torch.zeros(10, 16), torch.eye(16)):
        before, result = run(torch.ones(3, 16), x, NMPattern(2, 4))
        assert torch.equal(result.mask, before)
        assert result.notes == {"swaps": 0, "sweeps": 1, "swap_columns": 4, "swap_optimum": True}


def test_not_finished_is_said() -> None:
    weight, x = layer(16, 264, 700)
    _, result = run(weight, x, NMPattern(2, 4), sweeps=1)
    assert result.notes["sweeps"] == 1
    assert not result.notes["swap_optimum"]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 6),
    groups=st.integers(1, 20),
    tokens=st.integers(1, 60),
    pattern=st.sampled_from(["2:4", "4:8", "1:4", "row", "block", "layer"]),
    rounded=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_any_layer(n: int, groups: int, tokens: int, pattern: str, rounded: bool, seed: int) -> None:
    """Whatever the shape, one token or many, with ties or not: no worse, local optimum, as many kept as before."""
    weight, x = layer(n, 8 * groups, tokens, seed)
    if rounded:
        weight, x = weight.round(), x.round()
    group: Group = pattern if pattern in ("row", "block", "layer") else "row"  # type: ignore[assignment]
    chosen = parse_pattern(pattern) if ":" in pattern else UnstructuredPattern(0.5)
    before, result = run(weight, x, chosen, group)
    gram = gathered(x).gram
    was, now = losses(weight, before, gram), losses(weight, result.mask, gram)
    changed = (before != result.mask).any(dim=1)
    assert bool((now[changed] < was[changed]).all())
    assert torch.equal(result.mask.sum(dim=1), before.sum(dim=1))
    assert result.notes["swap_optimum"]
    assert_local_optimum(weight, result.mask, gram, size_of(chosen))


def test_registered_with_what_it_needs() -> None:
    assert SWAPS.needs == {"gram"}
    assert not SWAPS.own_metric


def test_across_windows_there_may_be_more_to_gain() -> None:
    """So the report says within how many columns there is no swap left, and nothing of the whole row."""
    weight, x = layer(6, 2 * WINDOW, 900)
    _, result = run(weight, x, UnstructuredPattern(0.5))
    assert (result.notes["swap_columns"], result.notes["swap_optimum"]) == (WINDOW, True)
    gram = gathered(x).gram
    before = losses(weight, result.mask, gram)
    gains = 0
    for p in range(0, WINDOW, 4):
        for u in range(WINDOW, 2 * WINDOW, 4):
            mask = result.mask.clone()
            rows = mask[:, p] & ~mask[:, u]
            mask[rows, p], mask[rows, u] = False, True
            gains += int((losses(weight, mask, gram) < before * (1 - 1e-4)).sum())
    assert gains > 0
    assert "converged" not in result.notes
