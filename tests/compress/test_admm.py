"""ADMM against the paper's iteration, written down again in float64 with explicit solves and sorted lists."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.errors import RecipeError
from compress.layer_statistics import LayerStatistics
from compress.methods import Pruning, Reconstructed
from compress.metrics.wanda import wanda
from compress.patterns import NMPattern, Pattern, UnstructuredPattern
from compress.recipe import Recipe
from compress.reconstruction import admm as module
from compress.reconstruction.admm import ADMM, ADMMOptions, admm
from compress.refit import joint_refit
from tests.compress.layers import layer
from tests.compress.test_held_out import damped_hessian, statistics_of
from tests.compress.test_refit import loss

P24 = NMPattern(2, 4)
pytestmark = pytest.mark.usefixtures("one_thread")


def run(
    weight: Tensor,
    statistics: LayerStatistics,
    pattern: Pattern = P24,
    group: Any = "layer",
    given: Tensor | None = None,
    **options: object,
) -> Reconstructed:
    """Without the refit, unless it is asked for."""
    chosen = ADMMOptions.model_validate({"refit_steps": 0, **options})
    return admm(weight, Pruning(pattern, group, given), statistics, chosen)


@dataclass
class Reference:
    weight: Tensor
    mask: Tensor
    margin: float
    """The smallest relative distance between a weight that was kept in some iteration and one that was not."""


def reference(
    weight: Tensor, x: Tensor, pattern: Pattern, group: str = "layer", given: Tensor | None = None, **options: Any
) -> Reference:
    """Algorithm of arXiv 2401.02938 with Z, U and V as it names them, one linear system an iteration."""
    iterations, selections = options.get("iterations", 20), options.get("selections", 15)
    rho, damping = options.get("rho", 1.0), options.get("mask_damping", 0.1)
    gram = x.double().T @ x.double()
    norm = gram.diagonal().sqrt()
    safe = torch.where(norm > 0, norm, 1.0)
    hessian = gram / safe / safe[:, None]
    hessian.fill_diagonal_(1 + damping)
    dense = weight.double() * norm
    n, k = dense.shape
    margin = float("inf")

    def smallest(scores: dict[tuple[int, int], float], count: int) -> list[tuple[int, int]]:
        nonlocal margin
        order = sorted(scores, key=lambda place: scores[place])
        if 0 < count < len(order):
            margin = min(margin, 1 - scores[order[count - 1]] / max(scores[order[count]], 1e-300))
        return order[:count]

    def select(scores: Tensor, share: float) -> Tensor:
        mask = torch.ones(n, k, dtype=torch.bool)
        pruned: list[tuple[int, int]] = []
        if isinstance(pattern, NMPattern):
            loose: dict[tuple[int, int], float] = {}
            for row, start in itertools.product(range(n), range(0, k, pattern.m)):
                members = {(row, start + j): float(scores[row, start + j]) for j in range(pattern.m)}
                loose |= {place: members[place] for place in smallest(members, pattern.m - pattern.keep_n)}
            pruned = smallest(loose, round(share * len(loose)))
        else:
            rows = [[row] for row in range(n)] if group == "row" else [list(range(n))]
            columns = [range(s, min(s + 128, k)) for s in range(0, k, 128)] if group == "block" else [range(k)]
            for some_rows, some_columns in itertools.product(rows, columns):
                places = {(i, j): float(scores[i, j]) for i in some_rows for j in some_columns}
                pruned += smallest(places, round(pattern.sparsity * share * len(places)))
        for place in pruned:
            mask[place] = False
        return mask

    mask = given if given is not None else select(dense.abs(), 1.0)
    v, u = dense.clone(), torch.zeros_like(dense)
    for t in range(1, iterations + 1):
        if t <= selections and given is None:
            mask = select((v + u).abs(), 1 - (1 - t / min(selections, iterations)) ** 3)
        elif 1 < t <= selections:
            mask = select((v + u).abs(), 1.0)
        z = (v + u) * mask
        u = u + v - z
        v = torch.linalg.solve(hessian + rho * torch.eye(k, dtype=torch.float64), hessian @ dense.T + rho * (z - u).T).T
    z = (v + u) * mask
    return Reference(torch.where(norm > 0, z / safe, weight.double() * mask), mask, margin)


def assert_equals_the_paper(n: int, k: int, t: int, pattern: Pattern, group: str = "layer", **options: Any) -> None:
    """On the first of the seeds in which no decision is so close that float32 may take it the other way."""
    for seed in range(40):
        weight, x = layer(n, k, t, seed)
        expected = reference(weight, x, pattern, group, **options)
        if expected.margin > 1e-4:
            break
    else:
        raise AssertionError("every seed has a close decision")
    done = run(weight, statistics_of(x, min(16, t)), pattern, group, **options)
    assert torch.equal(done.mask, expected.mask)
    scale = float(expected.weight.abs().max())
    torch.testing.assert_close(done.weight.double(), expected.weight, rtol=2e-3, atol=1e-4 * scale)
    assert not done.weight[~done.mask].any()


@pytest.mark.parametrize("pattern", [P24, NMPattern(1, 4), NMPattern(3, 6), NMPattern(4, 8)], ids=str)
@pytest.mark.parametrize(("n", "k", "t"), [(1, 24, 100), (3, 24, 400), (2, 48, 30)])
def test_nm_equals_the_paper(pattern: NMPattern, n: int, k: int, t: int) -> None:
    assert_equals_the_paper(n, k, t, pattern)


@pytest.mark.parametrize("group", ["row", "block", "layer"])
def test_unstructured_equals_the_paper_with_the_gradual_schedule_in_every_group(group: str) -> None:
    """The paper's code leaves it out where weights compete over the layer."""
    assert_equals_the_paper(3, 20, 300, UnstructuredPattern(0.6), group)
    assert_equals_the_paper(1, 136, 600, UnstructuredPattern(0.5), group, iterations=6, selections=4)


@pytest.mark.parametrize(
    "options",
    [
        {"iterations": 1},
        {"iterations": 7, "selections": 15},
        {"iterations": 30, "selections": 30},
        {"selections": 0},
        {"rho": 0.3, "mask_damping": 0.01},
    ],
    ids=str,
)
def test_options(options: dict[str, Any]) -> None:
    assert_equals_the_paper(3, 24, 200, P24, **options)
    assert_equals_the_paper(3, 24, 200, UnstructuredPattern(0.5), **options)


@pytest.mark.parametrize("selections", [0, 15])
@pytest.mark.parametrize(("pattern", "group"), [(P24, "row"), (UnstructuredPattern(0.5), "layer")], ids=str)
def test_a_given_mask_is_the_start_or_stays(pattern: Pattern, group: str, selections: int) -> None:
    weight, x = layer(4, 24, 300, seed=8)
    statistics = statistics_of(x)
    start = pattern.mask(weight.abs(), group)  # magnitude: a bad start
    expected = reference(weight, x, pattern, group, start, selections=selections)
    done = run(weight, statistics, pattern, group, start, selections=selections)
    assert torch.equal(done.mask, expected.mask)
    torch.testing.assert_close(done.weight.double(), expected.weight, rtol=2e-3, atol=1e-3)
    assert torch.equal(done.mask, start) is (selections == 0)
    hessian = damped_hessian(x.double(), 0.01)
    kept = run(weight, statistics, pattern, group, start, selections=0, refit_steps=50)
    better = run(weight, statistics, pattern, group, start, refit_steps=50)
    assert loss(weight, better.weight, hessian).sum() < loss(weight, kept.weight, hessian).sum()


def spread_out(n: int, k: int, m: int, scale: Tensor) -> Tensor:
    """Weights [n, k] of which, times ``scale`` [k], no two of any m neighbours are within 30 % of each other."""
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(n, k // m, m, generator=generator).argsort(dim=2)
    sign = torch.randn(n, k, generator=generator).sign()
    return sign * 1.3 ** (order + torch.rand(n, k // m, 1, generator=generator)).flatten(1) / scale


@pytest.mark.parametrize("pattern", [P24, NMPattern(4, 8), UnstructuredPattern(0.5)], ids=str)
def test_inputs_that_do_not_hang_together_leave_wandas_choice(pattern: Pattern) -> None:
    """Up to near ties: what was pruned counts for up to a tenth more here, by the damping."""
    scale = torch.linspace(0.1, 7, 32)
    weight = spread_out(9 if isinstance(pattern, NMPattern) else 1, 32, getattr(pattern, "m", 32), scale)
    statistics = statistics_of(torch.diag(scale), windows=4)
    done = run(weight, statistics, pattern, refit_steps=30)
    assert torch.equal(done.mask, pattern.mask(wanda(weight, statistics), "layer"))
    torch.testing.assert_close(done.weight, weight * done.mask, rtol=1e-3, atol=1e-5)


def test_equal_scores_keep_the_pattern() -> None:
    for pattern in (P24, NMPattern(3, 8), UnstructuredPattern(0.5)):
        done = run(torch.ones(5, 48), statistics_of(torch.eye(48), windows=4), pattern)
        assert int(done.mask.sum()) == round(5 * 48 * (1 - pattern.sparsity))
        if isinstance(pattern, NMPattern):
            assert bool((done.mask.unflatten(1, (-1, pattern.m)).sum(dim=2) == pattern.keep_n).all())
        assert not run(torch.zeros(5, 48), statistics_of(torch.eye(48), windows=4), pattern).weight.any()


@settings(max_examples=40)
@given(
    n=st.integers(1, 8),
    groups=st.integers(1, 12),
    tokens=st.integers(1, 150),
    windows=st.integers(1, 20),
    pattern=st.sampled_from([P24, NMPattern(4, 8), NMPattern(1, 4)]),
    dead=st.lists(st.integers(0, 7), max_size=6),
    has_bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_always_the_pattern_and_finite(
    n: int, groups: int, tokens: int, windows: int, pattern: NMPattern, dead: list[int], has_bias: bool, seed: int
) -> None:
    weight, x = layer(n, 8 * groups, tokens, seed)
    x[:, dead] = 0
    bias = torch.zeros(n) if has_bias else None
    done = run(weight, statistics_of(x, windows, bias=bias), pattern, refit_steps=30)
    assert bool((done.mask.unflatten(1, (-1, pattern.m)).sum(dim=2) == pattern.keep_n).all())
    assert not done.weight[~done.mask].any()
    assert bool(torch.isfinite(done.weight).all())
    assert (done.bias is not None) is has_bias
    kept_dead = done.mask[:, dead] & (x[:, dead] == 0).all(dim=0)
    torch.testing.assert_close(done.weight[:, dead][kept_dead], weight[:, dead][kept_dead])


def test_the_refit_starts_where_admm_ends_and_only_helps() -> None:
    weight, x = layer(12, 64, 1280)
    statistics = statistics_of(x)
    plain, done = run(weight, statistics), run(weight, statistics, refit_steps=40)
    assert torch.equal(done.mask, plain.mask)
    hessian = damped_hessian(x.double(), done.notes["damping"])
    assert loss(weight, done.weight, hessian).sum() < loss(weight, plain.weight, hessian).sum()
    best = joint_refit(weight, done.mask, statistics.gram, damping=done.notes["damping"], steps=300, tolerance=1e-10)
    assert float(loss(weight, done.weight, hessian).sum() / loss(weight, best.weight, hessian).sum()) < 1.001


def test_layers_of_one_input_share_the_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    made = module._factor
    monkeypatch.setattr(module, "_factor", lambda *given: calls.append(given[1:]) or made(*given))
    weight, x = layer(6, 32, 320)
    statistics = statistics_of(x)
    with_bias = LayerStatistics(statistics.inputs, bias=torch.zeros(6))
    first = run(weight, statistics)
    assert torch.equal(run(weight, statistics).weight, first.weight)
    run(weight[:3], statistics, NMPattern(1, 4))
    assert calls == [(0.1, 1.0)]
    run(weight, with_bias)  # without the mean, it is another matrix
    run(weight, statistics, rho=2.0)
    assert calls == [(0.1, 1.0), (0.1, 1.0), (0.1, 2.0)]


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_the_weight_and_the_mask_are_left_alone(layout: str) -> None:
    weight, x = layer(6, 32, 200)
    if layout == "transposed":
        weight = weight.T.contiguous().T
    mask = P24.mask(weight.abs())
    before = weight.clone(), mask.clone()
    for given_mask in (None, mask):
        run(weight, statistics_of(x), given=given_mask, refit_steps=5)
        assert torch.equal(weight, before[0])
        assert torch.equal(mask, before[1])


def test_recipes() -> None:
    fields: dict[str, Any] = {"pattern": "unstructured", "sparsity": 0.5, "format": "dense", "reconstruction": "admm"}
    assert Recipe.create(**fields).chosen_group == "layer"
    assert Recipe.create(**fields, group="layer").chosen_metric is None
    assert Recipe.create(**fields, group="row").chosen_group == "row"
    assert Recipe.create(**fields, metric="wanda").chosen_group == "row"
    assert Recipe.create(reconstruction="admm").needs == {"split_gram"} == ADMM.needs
    assert Recipe.create(reconstruction="admm", add_bias=True).add_bias
    with pytest.raises(RecipeError, match="cannot compare a whole layer"):
        Recipe.create(**{**fields, "reconstruction": "sparsegpt"}, group="layer")
    for bad in ({"iterations": 0}, {"rho": 0}, {"selections": -1}, {"damping": 0}, {"mask_damping": 11}):
        with pytest.raises(RecipeError, match=f"option '{next(iter(bad))}' of admm"):
            Recipe.create(reconstruction="admm", reconstruction_options=bad)
