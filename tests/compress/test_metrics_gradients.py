"""GBLM-Pruner, Pruner-Zero and Wanda++ against their formulas in float64, from one gradient a sample."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from compress.errors import RecipeError
from compress.methods import parse_options
from compress.metrics import METRICS
from compress.patterns import NMPattern
from compress.recipe import Recipe
from tests.compress.metric_cases import Case, case, score

SHAPES = [(1, 4, 1, 1), (5, 4, 30, 1), (12, 32, 200, 4), (30, 20, 64, 7)]


def sample_norms(made: Case) -> Tensor:
    """As Wanda's code has it: a running mean over samples of the squared norm of the sample's columns."""
    mean = torch.zeros(made.x.shape[1], dtype=torch.float64)
    samples = len(made.gradients)
    for seen, x in enumerate(made.x.double().tensor_split(samples)):
        mean = mean * seen / (seen + 1) + x.square().sum(dim=0) / (seen + 1)
    return mean.sqrt()


def gradient(made: Case, norm: str) -> Tensor:
    total = torch.zeros_like(made.weight, dtype=torch.float64)
    for one in made.gradients.double():
        total += one.abs() if norm == "l1" else one**2
    return total if norm == "l1" else total.sqrt()


def assert_scores(scores: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(scores.double(), expected, rtol=2e-6, atol=1e-30)


# GBLM-Pruner


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("alpha", [None, 0, 7.0])
@pytest.mark.parametrize(("n", "k", "t", "samples"), SHAPES)
def test_gblm_formula(n: int, k: int, t: int, samples: int, alpha: float | None, norm: str) -> None:
    made = case(n, k, t, samples)
    options = {"norm": norm, **({} if alpha is None else {"alpha": alpha})}
    weight = made.weight.double().abs()
    expected = weight * sample_norms(made) + (100 if alpha is None else alpha) * weight * gradient(made, norm)
    assert_scores(score("gblm", made, options), expected)


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("alpha", [None, 0.25])
def test_gblm_without_scale(alpha: float | None, norm: str) -> None:
    made = case()
    options = {"norm": norm, "scale": "free", **({} if alpha is None else {"alpha": alpha})}
    weight = made.weight.double().abs()
    inputs, gradients = weight * sample_norms(made), weight * gradient(made, norm)
    expected = inputs / inputs.mean() + (1 if alpha is None else alpha) * gradients / gradients.mean()
    assert_scores(score("gblm", made, options), expected)


def test_gblm_takes_the_l2_norm_and_the_scale_of_the_paper_by_itself() -> None:
    made = case()
    assert torch.equal(score("gblm", made), score("gblm", made, {"norm": "l2", "scale": "paper", "alpha": 100}))
    assert not torch.equal(score("gblm", made), score("gblm", made, {"norm": "l1"}))


def test_without_scale_that_of_the_gradients_does_not_matter() -> None:
    plain, scaled = case(), case()
    scaled.gradients *= 2.0**20
    assert torch.equal(score("gblm", plain, {"scale": "free"}), score("gblm", scaled, {"scale": "free"}))
    masks = [NMPattern(2, 4).mask(score("gblm", one)) for one in (plain, scaled)]
    assert not torch.equal(*masks), "with the paper's scale it does"


@pytest.mark.parametrize("name", ["gblm", "wanda++"])
def test_between_wanda_and_the_gradient(name: str) -> None:
    """No gradients, or a weight of 0, leave Wanda's mask; a huge weight leaves |W| G."""
    made = case()
    pattern = NMPattern(2, 4)
    wanda = pattern.mask(score("wanda", made))
    assert torch.equal(pattern.mask(score(name, made, {"alpha": 0})), wanda)
    g = gradient(made, "l2") if name == "gblm" else made.regional.double().square().mean(dim=0).sqrt()
    assert torch.equal(pattern.mask(score(name, made, {"alpha": 1e9})), pattern.mask(made.weight.double().abs() * g))
    without = case()
    without.gradients.zero_()
    without.regional.zero_()
    assert torch.equal(pattern.mask(score(name, without)), wanda)


@pytest.mark.parametrize("missing", ["gradients", "x"])
def test_gblm_without_scale_where_a_term_is_zero(missing: str) -> None:
    """A mean of zero divides nothing; the other term decides."""
    made = case()
    getattr(made, missing).zero_()
    scores = score("gblm", made, {"scale": "free"})
    weight = made.weight.double().abs()
    rest = weight * (sample_norms(made) if missing == "gradients" else gradient(made, "l2"))
    assert_scores(scores, rest / rest.mean())


# Pruner-Zero


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize(("n", "k", "t", "samples"), SHAPES)
def test_pruner_zero_formula(n: int, k: int, t: int, samples: int, norm: str) -> None:
    made = case(n, k, t, samples)
    g = gradient(made, norm).tolist()
    low, high = min(map(min, g)), max(map(max, g))
    expected = [[float(made.weight[i, j]) ** 2 * (g[i][j] - low) / (high - low) for j in range(k)] for i in range(n)]
    scores = score("pruner-zero", made, {"norm": norm})
    # The difference to the smallest gradient loses digits of the float32 statistic.
    torch.testing.assert_close(
        scores.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-6 * float(scores.max())
    )
    assert int(scores.argmin()) == int(torch.tensor(g).argmin())


def test_pruner_zero_takes_the_l2_norm_by_itself() -> None:
    made = case()
    assert torch.equal(score("pruner-zero", made), score("pruner-zero", made, {"norm": "l2"}))
    assert not torch.equal(score("pruner-zero", made), score("pruner-zero", made, {"norm": "l1"}))


def test_pruner_zero_does_not_hang_on_the_scale_of_the_gradients() -> None:
    plain, scaled = case(), case()
    scaled.gradients *= 2.0**12
    assert torch.equal(score("pruner-zero", plain), score("pruner-zero", scaled))


@pytest.mark.parametrize("value", [0.0, 1e-4])
def test_pruner_zero_with_equal_gradients_is_magnitude(value: float) -> None:
    made = case()
    made.gradients[:] = value
    assert torch.equal(score("pruner-zero", made), made.weight.square())


# Wanda++


@pytest.mark.parametrize("alpha", [None, 0, 7.0])
@pytest.mark.parametrize(("n", "k", "t", "samples"), SHAPES)
def test_wanda_plus_plus_formula(n: int, k: int, t: int, samples: int, alpha: float | None) -> None:
    made = case(n, k, t, samples)
    mean = sum(one**2 for one in made.regional.double()) / samples
    assert isinstance(mean, Tensor)
    expected = ((100 if alpha is None else alpha) * mean.sqrt() + sample_norms(made)) * made.weight.double().abs()
    assert_scores(score("wanda++", made, {} if alpha is None else {"alpha": alpha}), expected)


# Recipes


@pytest.mark.parametrize(
    ("metric", "options", "needs"),
    [
        ("gblm", {}, {"sum_of_squares", "gradient_l2"}),
        ("gblm", {"norm": "l1"}, {"sum_of_squares", "gradient_l1"}),
        ("pruner-zero", {}, {"gradient_l2"}),
        ("pruner-zero", {"norm": "l1"}, {"gradient_l1"}),
        ("wanda++", {}, {"sum_of_squares", "regional_gradient"}),
    ],
)
def test_a_recipe_asks_for_the_gradient_that_is_read(metric: str, options: dict[str, Any], needs: set[str]) -> None:
    recipe = Recipe.create(metric=metric, metric_options=options)
    assert recipe.needs == recipe.chosen_reconstruction.needs | needs


@pytest.mark.parametrize(
    ("metric", "options", "message"),
    [
        ("gblm", {"norm": "l3"}, "option 'norm' of gblm"),
        ("gblm", {"alpha": -1}, "option 'alpha' of gblm"),
        ("gblm", {"alpha": 1e30}, "option 'alpha' of gblm"),
        ("gblm", {"scale": "layer"}, "option 'scale' of gblm"),
        ("ria", {"alpha": 50}, "option 'alpha' of ria: Input should be less than or equal to 4"),
        ("stochria", {"alpha": 50}, "option 'alpha' of stochria"),
        ("wanda++", {"alpha": float("inf")}, r"option 'alpha' of wanda\+\+"),
        ("pruner-zero", {"alpha": 1}, "pruner-zero has no option 'alpha'"),
        ("wanda++", {"alpha": float("nan")}, r"option 'alpha' of wanda\+\+"),
    ],
)
def test_refusals(metric: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_options(METRICS[metric], options)
