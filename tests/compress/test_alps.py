"""ALPS against the paper's iteration and penalty schedule, written down again in float64; against every mask of a small layer."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.layer_statistics import LayerStatistics
from compress.layers import relative_output_error
from compress.methods import Pruning, Reconstructed
from compress.metrics.wanda import wanda
from compress.patterns import NMPattern, Pattern, UnstructuredPattern
from compress.recipe import Recipe
from compress.reconstruction import alps as module
from compress.reconstruction.admm import ADMMOptions, admm
from compress.reconstruction.alps import ALPSOptions, alps
from compress.reconstruction.refit import refit
from compress.reconstruction.sparsegpt import SparseGPTOptions, sparsegpt
from tests.compress.layers import layer
from tests.compress.test_admm import spread_out
from tests.compress.test_held_out import damped_hessian, statistics_of
from tests.compress.test_refit import by_kept_set, loss

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
    chosen = ALPSOptions.model_validate({"refit_steps": 0, **options})
    return alps(weight, Pruning(pattern, group, given), statistics, chosen)


@dataclass
class Reference:
    weight: Tensor
    mask: Tensor
    iterations: int
    margin: float = float("inf")
    """The smallest relative distance of a decision about the mask, in any iteration."""
    rhos: list[float] = field(default_factory=list)


def reference(
    weight: Tensor, x: Tensor, pattern: Pattern, given: Tensor | None = None, rho: float = 0.1, limit: int = 300
) -> Reference:
    """Algorithm of arXiv 2406.07831, one linear system an iteration; unstructured over the whole layer."""
    gram = x.double().T @ x.double()
    k = len(gram)
    gram += 0.01 * gram.diagonal().mean() * torch.eye(k, dtype=torch.float64)
    norm = gram.diagonal().sqrt()
    hessian = gram / norm / norm[:, None]
    dense = weight.double() * norm
    found = Reference(weight, torch.empty(0), 0)

    def project(values: Tensor) -> Tensor:
        groups = values.unflatten(1, (-1, pattern.m)) if isinstance(pattern, NMPattern) else values.view(1, 1, -1)
        size = groups.shape[-1]
        kept = pattern.keep_n if isinstance(pattern, NMPattern) else size - round(pattern.sparsity * size)
        ordered, places = groups.abs().sort(dim=-1, descending=True)
        gap = 1 - ordered[..., kept] / ordered[..., kept - 1]
        found.margin = min(found.margin, float(gap.min()))
        mask = torch.zeros_like(groups, dtype=torch.bool).scatter(-1, places[..., :kept], True).view_as(values)
        return values * mask

    start = project(dense) if given is None else dense * given
    d, v = start, torch.zeros_like(dense)
    before = start != 0
    grew, restarts = False, 0
    b = dense
    for iteration in range(1, limit + 1):
        found.iterations = iteration
        found.rhos.append(rho)
        system = hessian + rho * torch.eye(k, dtype=torch.float64)
        b = torch.linalg.solve(system, (dense @ hessian - v + rho * d).T).T
        d = project(b + v / rho)
        v = v + rho * (b - d)
        if iteration % 3 == 0:
            changed = int(((d != 0) != before).sum())
            share = changed / int((d != 0).sum())
            before = d != 0
            if share > 0.1:
                rho, grew = rho * 1.3, True
            elif share > 0.005:
                rho, grew = rho * 1.2, True
            elif not grew and restarts < 5:
                rho, restarts = rho / 5, restarts + 1
                d, v, before = start, torch.zeros_like(dense), start != 0
            elif changed == 0 or (iteration >= 30 and share < 3e-4):
                break
            else:
                rho *= 1.1
    projected = project(b)
    found.weight, found.mask = projected / norm, projected != 0
    return found


def clear_case(
    n: int, k: int, t: int, pattern: Pattern, least: float = 1e-5, **options: Any
) -> tuple[Tensor, Tensor, Reference]:
    """The first seed in which no decision is so close that float32 may take it the other way."""
    for seed in range(100):
        weight, x = layer(n, k, t, seed)
        expected = reference(weight, x, pattern, **options)
        if expected.margin > least:
            return weight, x, expected
    raise AssertionError("every seed has a close decision")


@pytest.mark.parametrize(
    "pattern", [P24, NMPattern(1, 4), NMPattern(3, 6), NMPattern(4, 8), UnstructuredPattern(0.6)], ids=str
)
@pytest.mark.parametrize(("n", "k", "t"), [(1, 24, 100), (3, 48, 400), (4, 24, 30)])
def test_equals_the_paper(pattern: Pattern, n: int, k: int, t: int) -> None:
    weight, x, expected = clear_case(n, k, t, pattern)
    done = run(weight, statistics_of(x), pattern)
    assert torch.equal(done.mask, expected.mask)
    assert done.notes["iterations"] == expected.iterations
    scale = float(expected.weight.abs().max())
    torch.testing.assert_close(done.weight.double(), expected.weight, rtol=5e-3, atol=5e-4 * scale)
    assert not done.weight[~done.mask].any()


def test_the_penalty_falls_where_it_is_too_large_from_the_start() -> None:
    """All over again with a fifth of it; and it rises later."""
    for pattern in (P24, UnstructuredPattern(0.5)):
        weight, x, expected = clear_case(4, 32, 300, pattern, rho=100.0)
        assert 20.0 in expected.rhos
        assert max(expected.rhos[expected.rhos.index(min(expected.rhos)) :]) > min(expected.rhos)
        done = run(weight, statistics_of(x), pattern, rho=100.0)
        assert done.notes["iterations"] == expected.iterations
        assert torch.equal(done.mask, expected.mask)


def test_the_penalty_rises_by_what_moves() -> None:
    rhos = set()
    for seed in range(4):
        weight, x = layer(6, 64, 600, seed)
        expected = reference(weight, x, P24)
        ratios = [round(b / a, 3) for a, b in itertools.pairwise(expected.rhos) if a != b]
        rhos |= set(ratios)
        assert all(a == b for (i, a), b in zip(enumerate(expected.rhos, 1), expected.rhos[1:], strict=False) if i % 3)
    assert rhos >= {1.3, 1.2}


def test_a_given_mask_is_the_start() -> None:
    for seed in range(40):
        weight, x = layer(3, 32, 300, seed)
        start = P24.mask(-weight.abs())  # the worst there is
        expected = reference(weight, x, P24, start)
        if expected.margin > 1e-5:
            break
    done = run(weight, statistics_of(x), P24, "row", start)
    assert torch.equal(done.mask, expected.mask)
    assert int((done.mask & start).sum()) < int(start.sum()) / 2
    hessian = damped_hessian(x.double(), 0.01)
    own = loss(weight, by_kept_set(weight, run(weight, statistics_of(x)).mask, hessian), hessian).sum()
    assert float(loss(weight, by_kept_set(weight, done.mask, hessian), hessian).sum() / own) < 1.1


def best_of_all_masks(weight: Tensor, hessian: Tensor) -> Tensor:
    """The least loss of each row [N] over all 2:4 masks, each with its own best weights."""
    n, k = weight.shape
    best = torch.full((n,), torch.inf, dtype=torch.float64)
    for chosen in itertools.product(itertools.combinations(range(4), 2), repeat=k // 4):
        mask = torch.zeros(k, dtype=torch.bool)
        mask[[4 * group + j for group, pair in enumerate(chosen) for j in pair]] = True
        best = torch.minimum(best, loss(weight, by_kept_set(weight, mask.expand(n, k), hessian), hessian))
    return best


def test_close_to_the_best_of_all_masks() -> None:
    """Brute force over the 36 masks of two groups, for layers of many rows."""
    for seed in range(4):
        weight, x = layer(48, 8, 200, seed)
        hessian = damped_hessian(x.double(), 0.01)
        best = best_of_all_masks(weight, hessian)
        statistics = statistics_of(x)
        by_wanda = P24.mask(wanda(weight, statistics))
        ours, start = (
            loss(weight, by_kept_set(weight, mask, hessian), hessian)
            for mask in (run(weight, statistics).mask, by_wanda)
        )
        assert bool((ours >= best * (1 - 1e-9)).all())
        assert float(ours.sum() / best.sum()) < 1.05
        assert float((ours <= best * (1 + 1e-9)).double().mean()) > 0.7
        assert float(ours.sum() - best.sum()) < 0.5 * float(start.sum() - best.sum())


@pytest.mark.parametrize("pattern", [P24, NMPattern(4, 8), UnstructuredPattern(0.5)], ids=str)
def test_the_identity_leaves_the_largest_weights(pattern: Pattern) -> None:
    """And ends soon, though the support never moves."""
    one = torch.ones(32)
    weight = spread_out(9 if isinstance(pattern, NMPattern) else 1, 32, getattr(pattern, "m", 32), one)
    done = run(weight, statistics_of(torch.eye(32), windows=4), pattern, refit_steps=30)
    assert torch.equal(done.mask, pattern.mask(weight.abs(), "layer"))
    torch.testing.assert_close(done.weight, weight * done.mask, rtol=1e-3, atol=1e-5)
    assert done.notes["iterations"] < 40


def test_equal_scores_keep_the_pattern() -> None:
    for pattern in (P24, NMPattern(3, 8), UnstructuredPattern(0.5)):
        done = run(torch.ones(5, 48), statistics_of(torch.eye(48), windows=4), pattern)
        assert int(done.mask.sum()) == round(5 * 48 * (1 - pattern.sparsity))
        assert not run(torch.zeros(5, 48), statistics_of(torch.eye(48), windows=4), pattern).weight.any()


@settings(max_examples=30)
@given(
    n=st.integers(1, 8),
    groups=st.integers(1, 10),
    tokens=st.integers(1, 150),
    pattern=st.sampled_from([P24, NMPattern(4, 8), NMPattern(1, 4)]),
    dead=st.lists(st.integers(0, 7), max_size=6),
    has_bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_always_the_pattern_and_finite(
    n: int, groups: int, tokens: int, pattern: NMPattern, dead: list[int], has_bias: bool, seed: int
) -> None:
    weight, x = layer(n, 8 * groups, tokens, seed)
    x[:, dead] = 0
    bias = torch.zeros(n) if has_bias else None
    done = run(weight, statistics_of(x, 8, bias=bias), pattern, refit_steps=30)
    assert bool((done.mask.unflatten(1, (-1, pattern.m)).sum(dim=2) == pattern.keep_n).all())
    assert not done.weight[~done.mask].any()
    assert bool(torch.isfinite(done.weight).all())
    assert done.notes["iterations"] <= 300
    assert (done.bias is not None) is has_bias


def test_layers_of_one_input_share_the_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    made = module._decompose
    monkeypatch.setattr(module, "_decompose", lambda *given: calls.append(given[1:]) or made(*given))
    weight, x = layer(6, 32, 320)
    statistics = statistics_of(x)
    first = run(weight, statistics)
    assert torch.equal(run(weight, statistics).weight, first.weight)
    run(weight[:3], statistics, NMPattern(1, 4), rho=0.5)
    assert calls == [(0.01,)]
    run(weight, statistics, mask_damping=0.1)
    assert calls == [(0.01,), (0.1,)]


def test_wide_inputs_are_decomposed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x, expected = clear_case(3, 48, 400, P24, least=1e-4)
    monkeypatch.setattr(module, "EXACT_WIDTH", 32)
    done = run(weight, statistics_of(x))
    assert torch.equal(done.mask, expected.mask)
    torch.testing.assert_close(done.weight.double(), expected.weight, rtol=5e-3, atol=1e-3)


def synthetic(seed: int) -> tuple[Tensor, Tensor]:
    """128 heavy-tailed rows of 256 inputs whose spectrum falls by a power, with a mean and outlier channels; 32 tokens an
    input."""
    generator = torch.Generator().manual_seed(seed)
    k = 256
    basis = torch.linalg.qr(torch.randn(k, k, generator=generator)).Q
    spectrum = torch.arange(1, k + 1) ** -0.35
    x = torch.randn(32 * k, k, generator=generator) * spectrum @ basis.T
    x += 0.1 * torch.randn(k, generator=generator) * x.std()
    channel = torch.exp(0.5 * torch.randn(k, generator=generator))
    channel[torch.randperm(k, generator=generator)[:5]] *= 10
    freedom = torch.distributions.StudentT(4.0)
    torch.manual_seed(seed)
    return freedom.sample((128, k)), x * channel


@pytest.mark.parametrize("seed", range(2))
def test_the_order_of_methods_in_layer_error(seed: int) -> None:
    """As measured for this project on a layer of this kind: SparseGPT 1, Wanda's mask with the refit .92, SparseGPT's
    with it .88, ADMM .86, ALPS .84."""
    weight, x = synthetic(seed)
    statistics = statistics_of(x, windows=64)
    statistics = LayerStatistics(statistics.inputs)
    vars(statistics.inputs)["gram"] = statistics.gram
    by_wanda = Pruning(P24, "row", P24.mask(wanda(weight, statistics)))
    own = Pruning(P24, "layer", None)
    walked = sparsegpt(weight, own, statistics, SparseGPTOptions(damping=0.01))
    results = {
        "sparsegpt": walked,
        "wanda + refit": refit(weight, by_wanda, statistics, ALPSOptions()),
        "sparsegpt + refit": refit(weight, Pruning(P24, "layer", walked.mask), statistics, ALPSOptions()),
        "admm": admm(weight, own, statistics, ADMMOptions()),
        "alps": alps(weight, own, statistics, ALPSOptions()),
    }
    errors = {name: relative_output_error(weight, done.weight, x) for name, done in results.items()}
    ratios = {name: error / errors["sparsegpt"] for name, error in errors.items()}
    expected = {"wanda + refit": 0.92, "sparsegpt + refit": 0.88, "admm": 0.86, "alps": 0.84}
    for name, ratio in expected.items():
        assert ratios[name] == pytest.approx(ratio, abs=0.04), ratios
    assert ratios["alps"] < ratios["admm"] < ratios["sparsegpt + refit"] < 1


def test_recipes() -> None:
    fields: dict[str, Any] = {"pattern": "unstructured", "sparsity": 0.5, "format": "dense", "reconstruction": "alps"}
    assert Recipe.create(**fields).chosen_group == "layer"
    assert Recipe.create(**fields, group="layer").chosen_metric is None
