"""The order of channels against all orders there are, on sizes where all can be tried."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.patterns import NMPattern
from compress.permutation import best_order, dealt, exchange_slot, retained

PATTERNS = [(1, 4), (2, 4), (3, 4), (1, 2), (4, 8), (2, 3)]


def kept(scores: torch.Tensor, keep_n: int, m: int) -> float:
    """The retained score, by sorting each group on its own."""
    rows = scores.double().tolist()
    return sum(
        value
        for row in rows
        for start in range(0, len(row), m)
        for value in sorted(row[start : start + m], reverse=True)[:keep_n]
    )


def groupings(columns: list[int], m: int) -> Iterator[list[int]]:
    """Every way to split the columns into groups of m, as an order; orders within and of groups do not matter."""
    if not columns:
        yield []
        return
    first, *others = columns
    for mates in combinations(others, m - 1):
        for rest in groupings([column for column in others if column not in mates], m):
            yield [first, *mates, *rest]


def drawn(kind: str, rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if kind == "ties":
        return torch.randint(0, 3, (rows, columns), generator=generator).float()
    spread = torch.exp(torch.randn(1, columns, generator=generator))
    return torch.randn(rows, columns, generator=generator).abs() * spread


@pytest.mark.parametrize(("keep_n", "m"), PATTERNS)
@pytest.mark.parametrize("kind", ["smooth", "ties"])
def test_retained_is_what_the_mask_keeps(keep_n: int, m: int, kind: str) -> None:
    scores = drawn(kind, 7, 4 * m, seed=1)
    assert retained(scores, keep_n, m) == pytest.approx(kept(scores, keep_n, m), rel=1e-6)
    mask = NMPattern(keep_n, m).mask(scores)
    assert retained(scores, keep_n, m) == pytest.approx(float(scores[mask].double().sum()), rel=1e-6)


@pytest.mark.parametrize(("keep_n", "m", "groups"), [(1, 4, 2), (2, 4, 2), (3, 4, 3), (2, 4, 3), (1, 2, 4), (2, 3, 3)])
@pytest.mark.parametrize("kind", ["smooth", "ties"])
def test_near_the_best_of_all_orders(keep_n: int, m: int, groups: int, kind: str) -> None:
    shares = []
    for seed in range(10):
        scores = drawn(kind, 5, groups * m, seed)
        found = best_order(scores, keep_n, m)
        assert found.sort().values.tolist() == list(range(groups * m))
        ours = kept(scores[:, found], keep_n, m)
        assert ours >= kept(scores, keep_n, m) * (1 - 1e-6)
        assert ours >= kept(scores[:, dealt(scores, m)], keep_n, m) * (1 - 1e-6)
        best = max(kept(scores[:, order], keep_n, m) for order in groupings(list(range(groups * m)), m))
        assert ours <= best * (1 + 1e-6)
        shares.append(ours / best)
    assert min(shares) > 0.9
    assert sum(shares) / len(shares) > 0.985


@pytest.mark.parametrize(("keep_n", "m"), PATTERNS)
@pytest.mark.parametrize("kind", ["smooth", "ties"])
def test_each_slot_is_exchanged_optimally(keep_n: int, m: int, kind: str) -> None:
    groups = 5
    for seed in range(4):
        scores = drawn(kind, 6, groups * m, seed)
        start = torch.randperm(groups * m, generator=torch.Generator().manual_seed(seed))
        for slot in range(m):
            found = exchange_slot(scores, start, slot, keep_n, m).view(groups, m)
            before = start.view(groups, m)
            others = [other for other in range(m) if other != slot]
            assert torch.equal(found[:, others], before[:, others])
            assert torch.equal(found[:, slot].sort().values, before[:, slot].sort().values)
            possible = []
            for exchange in permutations(range(groups)):
                order = before.clone()
                order[:, slot] = before[list(exchange), slot]
                possible.append(kept(scores[:, order.flatten()], keep_n, m))
            assert kept(scores[:, found.flatten()], keep_n, m) == pytest.approx(max(possible), rel=1e-6)


def test_the_strong_are_dealt_to_all_groups() -> None:
    scores = torch.tensor([[9.0, 8, 7, 6, 5, 4, 3, 2]])
    assert dealt(scores, 4).view(2, 4).tolist() == [[0, 3, 4, 7], [1, 2, 5, 6]]
    assert dealt(scores.flip(1), 4).view(2, 4).tolist() == [[7, 4, 3, 0], [6, 5, 2, 1]]
    # Of four strong neighbours 2:4 loses two; dealt out, none.
    crowded = torch.tensor([[1.0, 1, 1, 1, 0, 0, 0, 0]]).repeat(3, 4)
    assert kept(crowded, 2, 4) == 24
    assert kept(crowded[:, best_order(crowded, 2, 4)], 2, 4) == 48


def test_rows_that_disagree() -> None:
    """Column sums say nothing here: only the assignment can see that channels of one half get along."""
    one = torch.tensor([[1.0, 0], [0, 1]]).repeat(1, 8)  # each channel matters to one of two rows
    crowded = one[:, torch.arange(16).view(8, 2).T.flatten()]  # all of the first row's channels first
    assert kept(crowded, 2, 4) == 8
    assert kept(crowded[:, best_order(crowded, 2, 4)], 2, 4) == 16


@given(
    pattern=st.sampled_from(PATTERNS),
    groups=st.integers(1, 9),
    rows=st.integers(1, 12),
    kind=st.sampled_from(["smooth", "ties"]),
    seed=st.integers(0, 10_000),
)
def test_never_worse_than_no_order(pattern: tuple[int, int], groups: int, rows: int, kind: str, seed: int) -> None:
    keep_n, m = pattern
    scores = drawn(kind, rows, groups * m, seed)
    order = best_order(scores, keep_n, m)
    assert order.dtype == torch.int64
    assert order.sort().values.tolist() == list(range(groups * m))
    assert kept(scores[:, order], keep_n, m) >= kept(scores, keep_n, m) * (1 - 1e-6)
    assert torch.equal(order, best_order(scores, keep_n, m))


def test_no_scores_no_change() -> None:
    assert best_order(torch.zeros(3, 16), 2, 4).tolist() == list(range(16))
    equal = torch.ones(3, 16)
    assert best_order(equal, 2, 4).tolist() == list(range(16))


@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1e20, 3e37])
def test_scale_makes_no_difference(scale: float) -> None:
    scores = drawn("smooth", 64, 64, seed=3)
    scores /= scores.max()
    plain = retained(scores[:, best_order(scores, 2, 4)], 2, 4)
    scaled = retained(scores[:, best_order(scores * scale, 2, 4)], 2, 4)
    assert scaled == pytest.approx(plain, rel=2e-3)
    assert plain > 1.01 * retained(scores, 2, 4)


def test_chunks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = drawn("smooth", 50, 64, seed=4).double()
    whole = best_order(scores, 2, 4)
    monkeypatch.setattr("compress.permutation.CHUNK", 3 * 16)  # three rows at a time
    assert torch.equal(best_order(scores, 2, 4), whole)
    assert retained(scores, 2, 4) == pytest.approx(kept(scores, 2, 4), rel=1e-12)
