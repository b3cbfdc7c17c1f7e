"""The joint refit against explicit solutions, row by row in float64, by kept and by pruned set."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.methods import Pruning
from compress.patterns import NMPattern
from compress.reconstruction.sparsegpt import SparseGPTOptions, sparsegpt
from compress.refit import joint_refit
from tests.compress.layers import damped, gathered, layer

DAMPING = 0.01
pytestmark = pytest.mark.usefixtures("one_thread")


def by_kept_set(weight: Tensor, mask: Tensor, hessian: Tensor) -> Tensor:
    """V_K = (w H)_K (H_KK)⁻¹, a row at a time."""
    result = torch.zeros(weight.shape, dtype=torch.float64)
    for row, (w, kept) in enumerate(zip(weight.double(), mask, strict=True)):
        result[row, kept] = torch.linalg.solve(hessian[kept][:, kept], (w @ hessian)[kept])
    return result


def by_pruned_set(weight: Tensor, mask: Tensor, hessian: Tensor) -> Tensor:
    """w − w_P (K_PP)⁻¹ K_P: with K = H⁻¹, a row at a time (equation of APT)."""
    inverse = torch.linalg.inv(hessian)
    result = torch.zeros(weight.shape, dtype=torch.float64)
    for row, (w, kept) in enumerate(zip(weight.double(), mask, strict=True)):
        pruned = ~kept
        multipliers = torch.linalg.solve(inverse[pruned][:, pruned], w[pruned])
        result[row] = w - multipliers @ inverse[pruned]
    return result


def loss(weight: Tensor, changed: Tensor, hessian: Tensor) -> Tensor:
    """(v − w) H (v − w)ᵀ of each row, [N]."""
    change = changed.double() - weight.double()
    return ((change @ hessian) * change).sum(dim=1)


@pytest.mark.parametrize("seed", range(5))
def test_against_both_explicit_solutions(seed: int) -> None:
    weight, x = layer(7, 40, 300, seed)
    statistics = gathered(x)
    hessian, _ = damped(x, DAMPING)
    mask = NMPattern(2, 4).mask(weight.abs())
    kept, pruned = by_kept_set(weight, mask, hessian), by_pruned_set(weight, mask, hessian)
    torch.testing.assert_close(kept, pruned, rtol=1e-6, atol=1e-8)
    assert float(pruned[~mask].abs().max()) < 1e-9
    done = joint_refit(weight, mask, statistics.gram, damping=DAMPING, steps=200, tolerance=1e-12)
    assert not done.weight[~mask].any()
    torch.testing.assert_close(done.weight.double(), kept, rtol=2e-3, atol=2e-4)
    best = loss(weight, kept, hessian)
    torch.testing.assert_close(loss(weight, done.weight, hessian), best, rtol=1e-4, atol=0)


def test_the_loss_identity() -> None:
    """The loss of the optimum is w_P (K_PP)⁻¹ w_Pᵀ (without APT's factor of one half)."""
    weight, x = layer(6, 32, 200)
    hessian, _ = damped(x, DAMPING)
    inverse = torch.linalg.inv(hessian)
    mask = NMPattern(2, 4).mask(weight.abs())
    optimum = by_kept_set(weight, mask, hessian)
    for row in range(6):
        pruned = ~mask[row]
        w = weight[row].double()[pruned]
        expected = w @ torch.linalg.solve(inverse[pruned][:, pruned], w)
        assert float(loss(weight, optimum, hessian)[row]) == pytest.approx(float(expected), rel=1e-8)


def test_thirty_steps_suffice_on_correlated_inputs_with_outliers() -> None:
    weight, x = layer(16, 256, 2048)
    hessian, _ = damped(x, DAMPING)
    mask = NMPattern(2, 4).mask(weight.abs())
    best = loss(weight, by_kept_set(weight, mask, hessian), hessian).sum()
    done = joint_refit(weight, mask, gathered(x).gram, damping=DAMPING, steps=30, tolerance=1e-6)
    assert done.steps <= 30
    assert float(loss(weight, done.weight, hessian).sum() / best) < 1.001


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 9), groups=st.integers(1, 34), tokens=st.integers(1, 300), seed=st.integers(0, 1000))
def test_never_loses_to_sparsegpt_under_one_mask_and_damping(n: int, groups: int, tokens: int, seed: int) -> None:
    weight, x = layer(n, 4 * groups, tokens, seed)
    statistics, pattern = gathered(x), NMPattern(2, 4)
    single = sparsegpt(weight, Pruning(pattern, "block", None), statistics, SparseGPTOptions(damping=DAMPING))
    joint = joint_refit(
        weight, single.mask, statistics.gram, damping=DAMPING, start=single.weight, steps=60, tolerance=1e-9
    )
    hessian, _ = damped(x, DAMPING)
    ours, theirs = (loss(weight, v, hessian) for v in (joint.weight, single.weight))
    scale = loss(weight, torch.zeros_like(weight), hessian)
    assert bool((ours <= theirs * (1 + 1e-3) + 1e-6 * scale).all())


def test_more_steps_only_help_and_the_start_does_not_matter() -> None:
    weight, x = layer(8, 64, 400)
    gram = gathered(x).gram
    hessian, _ = damped(x, DAMPING)
    mask = NMPattern(2, 4).mask(weight.abs())
    losses = [
        float(
            loss(
                weight, joint_refit(weight, mask, gram, damping=DAMPING, steps=s, tolerance=1e-12).weight, hessian
            ).sum()
        )
        for s in (0, 1, 2, 4, 8, 16, 32, 64)
    ]
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in itertools.pairwise(losses))
    assert losses[-1] < 0.9 * losses[0]
    other = joint_refit(weight, mask, gram, damping=DAMPING, start=torch.randn(8, 64) * 3, steps=200, tolerance=1e-12)
    assert float(loss(weight, other.weight, hessian).sum()) == pytest.approx(losses[-1], rel=1e-4)


def test_the_ridge_pulls_to_the_dense_weights_and_dead_inputs_stay() -> None:
    weight, x = layer(5, 24, 200)
    x[:, 8:12] = 0
    mask = NMPattern(2, 4).mask(weight.abs())
    far = joint_refit(weight, mask, gathered(x).gram, damping=1e6, steps=50, tolerance=1e-12).weight
    torch.testing.assert_close(far, weight * mask, rtol=1e-3, atol=1e-4)
    near = joint_refit(weight, mask, gathered(x).gram, damping=DAMPING, steps=50, tolerance=1e-9).weight
    torch.testing.assert_close(near[:, 8:12], (weight * mask)[:, 8:12])
    nothing = joint_refit(weight, mask, torch.zeros(24, 24), damping=DAMPING)
    torch.testing.assert_close(nothing.weight, weight * mask)
    empty = joint_refit(torch.zeros(5, 24), mask, gathered(x).gram, damping=DAMPING)
    assert not empty.weight.any()
    assert empty.steps == 0
