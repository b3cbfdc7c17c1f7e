"""Metrics against their formulas in float64, and against what they stand for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.metrics import METRICS
from compress.metrics.magnitude import magnitude
from compress.metrics.wanda import wanda
from compress.patterns import NMPattern
from compress.statistics import InputStatistics


def layer(n: int = 12, k: int = 32, t: int = 200, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator)
    scale = torch.randn(k, generator=generator).exp()  # channels differ, as they do in real models
    return weight, torch.randn(t, k, generator=generator) * scale + 0.3


def gathered(x: Tensor, *needs: str) -> InputStatistics:
    statistics = InputStatistics(needs, x.shape[-1], tokens=len(x))
    statistics.update(x)
    return statistics


def test_magnitude_formula() -> None:
    weight, _ = layer()
    assert torch.equal(magnitude(weight), torch.maximum(weight, -weight))


def test_wanda_formula() -> None:
    weight, x = layer()
    expected = weight.double().abs() * x.double().pow(2).sum(dim=0).sqrt()
    scores = wanda(weight, gathered(x, "sum_of_squares"))
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), expected, rtol=1e-6, atol=0)


def test_wanda_does_not_hang_on_the_number_of_tokens() -> None:
    weight, x = layer()
    once, twice = (wanda(weight, gathered(inputs, "sum_of_squares")) for inputs in (x, torch.cat([x, x])))
    pattern = NMPattern(2, 4)
    assert torch.equal(pattern.mask(once), pattern.mask(twice))
    assert not torch.equal(pattern.mask(once), pattern.mask(weight.abs())), "the inputs must matter in this test"


def test_wanda_squared_is_the_loss_of_removing_one_weight() -> None:
    """With uncorrelated inputs the loss increase of a single removal, measured by brute force, is Wanda's score squared.

    The inputs are scaled unit vectors, so XᵀX is exactly diagonal. Optimal-brain surgery then changes no other
    weight, and removing w_ij costs w_ij² H_jj.
    """
    weight, _ = layer(n=3, k=8)
    generator = torch.Generator().manual_seed(5)
    x = torch.diag(torch.rand(8, generator=generator) + 0.1)
    scores = wanda(weight, gathered(x, "sum_of_squares"))
    dense = x.double() @ weight.double().T
    for i in range(3):
        for j in range(8):
            removed = weight.double().clone()
            removed[i, j] = 0
            loss = (x.double() @ removed.T - dense).square().sum()
            assert float(scores[i, j]) ** 2 == pytest.approx(float(loss), rel=1e-5)


def test_optimal_brain_score_with_a_diagonal_hessian_is_wanda() -> None:
    """w_ij² / (H⁻¹)_jj, the metric of optimal-brain surgery, computed with an explicit inverse."""
    weight, x = layer()
    hessian = torch.diag(x.double().pow(2).sum(dim=0))
    brain = weight.double().square() / torch.linalg.inv(hessian).diagonal()
    torch.testing.assert_close(wanda(weight, gathered(x, "sum_of_squares")).double().square(), brain, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", sorted(METRICS))
def test_metrics_leave_the_weight_alone_and_declare_what_they_need(name: str) -> None:
    weight, x = layer()
    before = weight.clone()
    metric = METRICS[name]
    scores = metric.score(weight, gathered(x, *metric.needs), metric.options())
    assert metric.name == name
    assert scores.shape == weight.shape
    assert torch.equal(weight, before)
