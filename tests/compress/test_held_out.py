"""The damping chosen on held-out windows, against float64 solutions on a fine grid; and what the refit does with it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress import held_out
from compress.held_out import LEAST_HELD_OUT, STRONGEST, WEAKEST, RefitOptions, choose_damping, layer_problem
from compress.layer_statistics import LayerStatistics
from compress.methods import Pruning, Reconstructed
from compress.metrics.wanda import wanda
from compress.patterns import NMPattern, UnstructuredPattern
from compress.reconstruction.refit import REFIT, refit
from compress.refit import Refit
from compress.refit import joint_refit as whole_joint_refit
from tests.compress.layers import gathered, layer
from tests.compress.test_refit import by_kept_set, loss

P24 = NMPattern(2, 4)
NEEDS = ("split_gram", "sum_of_squares", "sample", "moments")
pytestmark = pytest.mark.usefixtures("one_thread")


def statistics_of(x: Tensor, windows: int = 16, **more: Any) -> LayerStatistics:
    return gathered(x, NEEDS, windows=windows, **more)


def run(weight: Tensor, statistics: LayerStatistics, mask: Tensor | None = None, **options: object) -> Reconstructed:
    mask = P24.mask(wanda(weight, statistics)) if mask is None else mask
    return refit(weight, Pruning(P24, "row", mask), statistics, RefitOptions.model_validate(options))


def parts(x: Tensor, windows: int = 16) -> tuple[Tensor, Tensor]:
    """Rows to fit to, and those held out: every second window of 16."""
    number = torch.arange(len(x)) // (len(x) // windows)
    return x[number % 2 == 0], x[number % 2 == 1]


def damped_hessian(x: Tensor, damping: float) -> Tensor:
    hessian = x.double().T @ x.double()  # of inputs as they are counted
    return hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)


def held_out_error(weight: Tensor, mask: Tensor, fit: Tensor, other: Tensor, damping: float) -> float:
    """Of the exact solution, a row at a time."""
    solution = by_kept_set(weight, mask, damped_hessian(fit, damping))
    outputs = other.double() @ weight.double().T
    return float((other.double() @ solution.T - outputs).square().sum() / outputs.square().sum())


@pytest.mark.parametrize("tokens_per_input", [1, 2, 8, 32])
@pytest.mark.parametrize("seed", range(2))
def test_the_choice_is_as_good_as_the_best_of_a_fine_grid(tokens_per_input: int, seed: int) -> None:
    weight, x = layer(24, 48, 2 * 48 * tokens_per_input, seed)
    mask = P24.mask(weight.abs() * x.norm(dim=0))
    fit, other = parts(x.double())
    choice = choose_damping(weight, mask, layer_problem(statistics_of(x)), steps=200, tolerance=1e-8)
    ours = held_out_error(weight, mask, fit, other, choice.damping)
    assert choice.held_out_error == pytest.approx(ours, rel=5e-3)
    fine = [held_out_error(weight, mask, fit, other, 10 ** (eighth / 8)) for eighth in range(-36, 13)]
    assert ours <= 1.02 * min(fine)
    solution = by_kept_set(weight, mask, damped_hessian(fit, choice.damping))
    outputs = fit.double() @ weight.double().T
    fit_error = float((fit.double() @ solution.T - outputs).square().sum() / outputs.square().sum())
    assert choice.fit_error == pytest.approx(fit_error, rel=5e-3)
    assert choice.tried[choice.damping] == choice.held_out_error == min(choice.tried.values())


def test_fewer_tokens_are_damped_more() -> None:
    dampings = {}
    for tokens_per_input in (1, 4, 32):
        weight, x = layer(32, 64, 2 * 64 * tokens_per_input, seed=5)
        dampings[tokens_per_input] = run(weight, statistics_of(x)).notes["damping"]
    assert dampings[1] > dampings[4] >= dampings[32]


def test_the_grid_goes_on_where_its_edge_wins_and_ends_somewhere() -> None:
    weight, x = layer(8, 16, 3200, seed=2)
    mask = P24.mask(weight.abs())
    problem = layer_problem(statistics_of(x))

    def choose(other: Tensor) -> held_out.Choice:
        judged = held_out.LayerProblem(problem.fit, other, other, problem.mean, False)
        return choose_damping(weight, mask, judged, steps=200, tolerance=1e-10)

    # Nothing is held out of what is fitted: no ridge is best, and below some it makes no difference.
    weakest = choose(problem.fit)
    assert WEAKEST <= round(2 * math.log10(weakest.damping)) < -4
    assert min(weakest.tried) <= weakest.damping
    # Held out: inputs that hang together the other way round, so that every repair does harm.
    values, vectors = torch.linalg.eigh(2 * torch.diag(problem.fit.diagonal()) - problem.fit)
    strongest = choose((vectors * values.clamp(min=0)) @ vectors.T)
    assert 0.3 < strongest.damping <= 10 ** (STRONGEST / 2)
    # In between: beyond the best, one more was tried on either side.
    other = statistics_of(layer(8, 16, 24, seed=3)[1])
    middle = choose_damping(weight, mask, layer_problem(other), steps=200, tolerance=1e-9)
    assert min(middle.tried) < middle.damping < max(middle.tried)


def test_what_is_held_out_is_not_seen_by_the_choice() -> None:
    """Errors of the fitted part come from that part alone, whatever is in the other."""
    weight, x = layer(12, 32, 320)
    mask = P24.mask(weight.abs())
    number = torch.arange(320) // 20 % 2
    one = choose_damping(weight, mask, layer_problem(statistics_of(x)), steps=50, tolerance=1e-8)
    changed = torch.where(number[:, None] == 1, x.flip(0) * 3, x)
    other = choose_damping(weight, mask, layer_problem(statistics_of(changed)), steps=50, tolerance=1e-8)
    common = one.tried.keys() & other.tried.keys()
    assert len(common) >= 3
    if one.damping == other.damping:
        assert one.fit_error == other.fit_error
    assert one.held_out_error != other.held_out_error


def test_the_result_is_the_solution_on_everything_at_the_chosen_damping() -> None:
    weight, x = layer(9, 40, 640)
    statistics = statistics_of(x)
    done = run(weight, statistics, refit_steps=200, refit_tolerance=1e-10)
    expected = by_kept_set(weight, done.mask, damped_hessian(x.double(), done.notes["damping"]))
    torch.testing.assert_close(done.weight.double(), expected, rtol=2e-3, atol=2e-4)
    assert torch.equal(done.mask, P24.mask(wanda(weight, statistics)))
    assert done.notes["held_out_tokens"] == 320
    assert done.notes["tokens_per_input"] == 16
    assert 0 < done.notes["fit_error"] < done.notes["held_out_error"]
    assert done.bias is None


def test_a_given_damping_is_used_and_nothing_chosen() -> None:
    weight, x = layer(9, 40, 640)
    done = run(weight, statistics_of(x), damping=0.2, refit_steps=100, refit_tolerance=1e-10)
    assert done.notes["damping"] == 0.2
    assert "held_out_error" not in done.notes
    expected = by_kept_set(weight, done.mask, damped_hessian(x.double(), 0.2))
    torch.testing.assert_close(done.weight.double(), expected, rtol=2e-3, atol=2e-4)


@settings(max_examples=30)
@given(
    n=st.integers(1, 9),
    groups=st.integers(1, 16),
    tokens=st.integers(1, 200),
    windows=st.integers(1, 20),
    seed=st.integers(0, 1000),
    has_bias=st.booleans(),
)
def test_never_worse_than_the_mask_alone_on_the_damped_objective(
    n: int, groups: int, tokens: int, windows: int, seed: int, has_bias: bool
) -> None:
    weight, x = layer(n, 4 * groups, tokens, seed)
    bias = torch.randn(n, generator=torch.Generator().manual_seed(seed)) if has_bias else None
    statistics = statistics_of(x, windows, bias=bias)
    done = run(weight, statistics)
    hessian = layer_problem(statistics).whole.double()
    mean = hessian.diagonal().mean()
    ridge = done.notes["damping"] * (mean if mean > 0 else 1.0)
    hessian = hessian + ridge * torch.eye(len(hessian), dtype=torch.float64)
    before = loss(weight, weight * done.mask, hessian)
    after = loss(weight, done.weight, hessian)
    assert float(after.sum()) <= float(before.sum()) * (1 + 1e-3) + 1e-6 * float(
        loss(weight, torch.zeros_like(weight), hessian).sum()
    )
    assert not done.weight[~done.mask].any()
    assert bool(torch.isfinite(done.weight).all())
    assert (done.bias is not None) is has_bias


def test_the_bias_and_the_weights_are_the_joint_optimum() -> None:
    """With a column of ones as a further input that is always kept and never damped, all in float64."""
    weight, x = layer(7, 32, 640, seed=4)
    x += 2  # a mean that matters
    bias = torch.linspace(-1, 1, 7)
    statistics = statistics_of(x, bias=bias)
    done = run(weight, statistics, refit_steps=200, refit_tolerance=1e-10)
    assert done.bias is not None
    centred = x.double() - x.double().mean(dim=0)
    ridge = done.notes["damping"] * (centred.square().sum(dim=0).mean())
    with_one = torch.cat([x.double(), torch.ones(len(x), 1, dtype=torch.float64)], dim=1)
    hessian = with_one.T @ with_one + ridge * torch.diag(torch.tensor([1.0] * 32 + [0.0], dtype=torch.float64))
    dense = torch.cat([weight, bias[:, None]], dim=1)
    kept = torch.cat([done.mask, torch.ones(7, 1, dtype=torch.bool)], dim=1)
    expected = by_kept_set(dense, kept, hessian)
    torch.testing.assert_close(done.weight.double(), expected[:, :-1], rtol=2e-3, atol=5e-4)
    torch.testing.assert_close(done.bias.double(), expected[:, -1], rtol=2e-3, atol=2e-3)
    # And it pays: the error with the bias is below that of the same mask without one.
    plain = run(weight, statistics_of(x), mask=done.mask, refit_steps=200)
    change = x @ (done.weight - weight).T + (done.bias - bias)
    assert float(change.square().sum()) < float((x @ (plain.weight - weight).T).square().sum())


def test_held_out_error_with_a_bias_is_that_of_outputs() -> None:
    """The bias comes from the fitted part, and the held-out outputs are judged with it."""
    weight, x = layer(7, 32, 640, seed=4)
    x += 2
    mask = P24.mask(weight.abs())
    fit, other = parts(x.double())
    problem = layer_problem(statistics_of(x, bias=torch.zeros(7)))
    choice = choose_damping(weight, mask, problem, steps=200, tolerance=1e-9)
    mean = fit.double().mean(dim=0)
    hessian = damped_hessian((fit.double() - mean), choice.damping)
    solution = by_kept_set(weight, mask, hessian)
    shift = (weight.double() - solution) @ mean
    error = float((other.double() @ (solution - weight.double()).T + shift).square().sum())
    energy = float(((other.double() - mean) @ weight.double().T).square().sum())
    assert choice.held_out_error == pytest.approx(error / energy, rel=5e-3)


def test_few_tokens_are_told_and_too_few_choose_nothing() -> None:
    weight, x = layer(6, 64, 160)
    few = run(weight, statistics_of(x)).notes
    assert few["warning"].startswith("2.5 calibration tokens per input channel are few for a refit")
    assert f"a damping of {few['damping']:.2g} was chosen on 80 held-out tokens" in few["warning"]
    one = run(weight, statistics_of(x[:1], windows=1))
    assert one.notes["damping"] == 0.1
    assert "held_out_error" not in one.notes
    assert "0.016 calibration tokens per input channel are few" in one.notes["warning"]
    below = statistics_of(x[: 2 * LEAST_HELD_OUT - 2], windows=2)
    assert below.split_gram.held_out.tokens == LEAST_HELD_OUT - 1
    assert "held_out_error" not in run(weight, below).notes
    assert "warning" not in run(weight, statistics_of(layer(6, 64, 2000)[1])).notes


def test_only_some_rows_are_used_to_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def counting(dense: Tensor, *arguments: Any, **more: Any) -> Refit:
        sizes.append(len(dense))
        return whole_joint_refit(dense, *arguments, **more)

    monkeypatch.setattr(held_out, "joint_refit", counting)
    weight, x = layer(900, 16, 640)
    run(weight, statistics_of(x))
    assert len(set(sizes[:-1])) == 1
    assert held_out.ROWS <= sizes[0] < 2 * held_out.ROWS
    assert sizes[-1] == 900


def test_dead_inputs_zero_rows_and_no_input_at_all() -> None:
    weight, x = layer(6, 32, 640)
    x[:, 8:12] = 0
    weight[2] = 0
    done = run(weight, statistics_of(x))
    torch.testing.assert_close(done.weight[:, 8:12], (weight * done.mask)[:, 8:12])
    assert not done.weight[2].any()
    dead = run(weight, statistics_of(torch.zeros(64, 32), windows=2))
    torch.testing.assert_close(dead.weight, weight * dead.mask)


def test_unstructured_masks_of_any_metric() -> None:
    weight, x = layer(10, 36, 720)
    statistics = statistics_of(x)
    mask = UnstructuredPattern(0.6).mask(weight.abs(), "layer")
    mask[4] = False
    mask[5] = True
    pruning = Pruning(UnstructuredPattern(0.6), "layer", mask)
    done = refit(weight, pruning, statistics, RefitOptions())
    assert torch.equal(done.mask, mask)
    assert not done.weight[4].any()
    torch.testing.assert_close(done.weight[5], weight[5], rtol=1e-3, atol=1e-3)
    assert not REFIT.own_metric
