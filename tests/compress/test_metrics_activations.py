"""RIA, stochRIA, STADE and SymWanda against their formulas in float64, and against what they stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compress.errors import RecipeError
from compress.methods import parse_options
from compress.metrics import METRICS
from compress.patterns import NMPattern
from compress.recipe import Recipe
from tests.compress.metric_cases import Case, case, score
from tests.compress.test_metrics import FLAGS, degenerate

SHAPES = [(1, 4, 1), (1, 16, 30), (5, 4, 30), (12, 32, 200), (30, 20, 64)]


def assert_scores(scores: Tensor, expected: list[list[float]] | Tensor) -> None:
    torch.testing.assert_close(scores.double(), torch.as_tensor(expected, dtype=torch.float64), rtol=2e-6, atol=1e-30)


def norms(x: Tensor) -> list[float]:
    """The Euclidean norm of each column of x [T, K]."""
    return [sum(float(value) ** 2 for value in column) ** 0.5 for column in x.double().T]


# RIA


def ria_by_entry(made: Case, alpha: float) -> list[list[float]]:
    weight = made.weight.double().abs().tolist()
    columns = [sum(row[j] for row in weight) for j in range(len(weight[0]))]
    factors = [norm**alpha for norm in norms(made.x)]
    return [[(w / columns[j] + w / sum(row)) * factors[j] for j, w in enumerate(row)] for row in weight]


@pytest.mark.parametrize("alpha", [0, 0.5, 1, 2.5])
@pytest.mark.parametrize(("n", "k", "t"), SHAPES)
def test_ria_formula(n: int, k: int, t: int, alpha: float) -> None:
    made = case(n, k, t)
    assert_scores(score("ria", made, {"alpha": alpha}), ria_by_entry(made, alpha))
    if alpha == 0.5:
        assert_scores(score("ria", made), ria_by_entry(made, alpha))


def test_relative_importance_sums_to_the_number_of_rows_and_columns() -> None:
    made = case(7, 20)
    assert float(score("ria", made, {"alpha": 0}).sum()) == pytest.approx(7 + 20, rel=1e-6)


@given(row_power=st.integers(-8, 8), seed=st.integers(0, 20))
def test_a_row_that_is_scaled_keeps_its_share_of_the_row(row_power: int, seed: int) -> None:
    """Relative to its row a weight is what it was: it scores at least |w| / (row sum)."""
    made = case(4, 16, 40, seed=seed)
    share = made.weight[2].abs() / made.weight[2].abs().sum()
    made.weight[2] *= 2.0**row_power
    assert (score("ria", made, {"alpha": 0})[2] >= share * (1 - 1e-6)).all()


# stochRIA


@given(
    n=st.integers(1, 6),
    groups=st.integers(1, 6),
    tokens=st.sampled_from([1, 30]),
    seed=st.integers(0, 50),
    alpha=st.sampled_from([0.0, 0.5, 1.0]),
    flags=st.sets(st.sampled_from(FLAGS), max_size=3),
)
def test_stochria_of_everything_is_ria(
    n: int, groups: int, tokens: int, seed: int, alpha: float, flags: set[str]
) -> None:
    made = degenerate(n, 4 * groups, tokens, seed, frozenset(flags))
    assert torch.equal(score("stochria", made, {"fraction": 1, "alpha": alpha}), score("ria", made, {"alpha": alpha}))


@pytest.mark.parametrize(("n", "k"), [(1, 4), (3, 8), (20, 30), (64, 128)])
def test_stochria_formula(n: int, k: int) -> None:
    """The drawn rows and columns are found out from outside: their weights change the scores of the others."""
    made = case(n, k, 40, seed=n)
    rows, columns = max(round(0.1 * n), 1), max(round(0.1 * k), 1)
    ones = Case(torch.ones(n, k), made.x, made.gradients, made.regional, seed=made.seed)
    assert_scores(score("stochria", ones, {"alpha": 0}), torch.full((n, k), 1 / n + 1 / k))

    drawn_columns = _drawn(made, dim=1)
    drawn_rows = _drawn(made, dim=0)
    assert (len(drawn_rows), len(drawn_columns)) == (rows, columns)
    weight = made.weight.double().abs()
    column_sums = weight[drawn_rows].sum(dim=0) * n / rows
    row_sums = weight[:, drawn_columns].sum(dim=1) * k / columns
    norm = made.x.double().square().sum(dim=0).sqrt()
    assert_scores(score("stochria", made), (weight / column_sums + weight / row_sums[:, None]) * norm.sqrt())


def _drawn(made: Case, dim: int) -> list[int]:
    """The rows (0) or columns (1) whose weights change the scores of other rows or columns."""
    n, k = made.weight.shape
    reference = torch.ones(n, k)
    base = score("stochria", Case(reference, made.x, made.gradients, made.regional, seed=made.seed), {"alpha": 0})
    found = []
    for index in range((n, k)[dim]):
        weight = reference.clone()
        weight.select(dim, index).fill_(2)
        changed = score("stochria", Case(weight, made.x, made.gradients, made.regional, seed=made.seed), {"alpha": 0})
        other = (index + 1) % (n, k)[dim]
        if (n, k)[dim] == 1 or not torch.equal(changed.select(dim, other), base.select(dim, other)):
            found.append(index)
    return found


def test_stochria_hangs_on_the_seed_and_comes_close_to_ria() -> None:
    """The masks agree with RIA's far more than by chance, though not everywhere."""
    made, other = case(64, 128), case(64, 128)
    other.seed = 1
    scores = score("stochria", made)
    assert torch.equal(scores, score("stochria", made))
    assert not torch.equal(scores, score("stochria", other))
    mask, exact = NMPattern(2, 4).mask(scores), NMPattern(2, 4).mask(score("ria", made))
    assert 0.85 < float((mask == exact).float().mean()) < 1


@pytest.mark.parametrize("fraction", [0, -0.1, 1.1, float("nan")])
def test_stochria_refuses_a_fraction_that_is_none(fraction: float) -> None:
    with pytest.raises(RecipeError, match="option 'fraction' of stochria"):
        parse_options(METRICS["stochria"], {"fraction": fraction})


# STADE


def variances(x: Tensor) -> Tensor:
    """Unbiased, in two passes; 0 of a single row."""
    x = x.double()
    centred = x - x.mean(dim=0)
    return centred.square().sum(dim=0) / max(len(x) - 1, 1)


@pytest.mark.parametrize(("n", "k", "t"), SHAPES)
def test_stade_formula(n: int, k: int, t: int) -> None:
    made = case(n, k, t)
    paper = made.weight.double().square() * variances(made.x)
    scores = score("stade", made)
    torch.testing.assert_close(scores.double().square(), paper, rtol=1e-5, atol=1e-30)
    if t == 1:
        assert not scores.any()


@pytest.mark.parametrize("after_norm", [True, False])
def test_stade_w_is_wanda_after_a_norm_and_stade_elsewhere(after_norm: bool) -> None:
    made = case(after_norm=after_norm)
    scores = {name: score(name, made) for name in ("stade", "wanda", "stade-w")}
    assert torch.equal(scores["stade-w"], scores["wanda" if after_norm else "stade"])
    assert not torch.equal(scores["stade"], scores["wanda"])


def test_stade_is_wanda_of_centred_inputs() -> None:
    """Up to the factor √(T − 1)."""
    made = case()
    centred = case()
    centred.x = (made.x.double() - made.x.double().mean(dim=0)).float()
    wanda = score("wanda", centred) / (len(made.x) - 1) ** 0.5
    torch.testing.assert_close(score("stade", made), wanda, rtol=1e-4, atol=0)


def test_stade_does_not_hang_on_the_mean() -> None:
    """Far-off means, which Wanda takes for importance."""
    made, moved = case(), case()
    moved.x = made.x + 1000 * torch.randn(made.x.shape[1], generator=torch.Generator().manual_seed(9))
    torch.testing.assert_close(score("stade", moved), score("stade", made), rtol=1e-3, atol=0)
    masks = [NMPattern(2, 4).mask(score("wanda", one)) for one in (made, moved)]
    assert not torch.equal(*masks)


def uncorrelated(t: int, k: int) -> Tensor:
    """Inputs [t, k] with a mean whose centred covariance is diagonal."""
    generator = torch.Generator().manual_seed(4)
    raw = torch.randn(t, k, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(torch.cat([torch.ones(t, 1, dtype=torch.float64), raw], dim=1)).Q[:, 1:]
    scale = torch.randn(k, generator=generator, dtype=torch.float64).exp() * t**0.5
    return (basis * scale + 2 * torch.randn(k, generator=generator, dtype=torch.float64)).float()


def test_stade_squared_is_the_loss_of_removing_one_weight_with_a_free_bias() -> None:
    """By brute force: remove one weight, fit all others and the bias by least squares, measure what is left."""
    made = case(3, 8)
    made.x = uncorrelated(40, 8)
    scores = score("stade", made).double()
    x = made.x.double()
    with_ones = torch.cat([torch.ones(len(x), 1, dtype=torch.float64), x], dim=1)
    for i in range(3):
        for j in range(8):
            lost = x[:, j] * made.weight[i, j].double()
            others = with_ones[:, [column for column in range(9) if column != j + 1]]
            fitted = others @ torch.linalg.lstsq(others, lost[:, None]).solution[:, 0]
            loss = float((lost - fitted).square().sum()) / (len(x) - 1)
            assert float(scores[i, j]) ** 2 == pytest.approx(loss, rel=1e-4)
            assert float(lost.square().sum()) / (len(x) - 1) > 1.01 * loss, "the mean must matter in this test"


# SymWanda


def symwanda_by_entry(made: Case, input: str, output: str, p: float, alpha: float) -> list[list[float]]:
    weight = made.weight.double().abs()
    x, y = norms(made.x), norms(made.y)

    def term(kind: str, activation: float, weights: Tensor) -> float:
        size = sum(float(w) ** p for w in weights) ** (1 / p)
        return {"none": 0, "constant": 1, "activations": activation, "weights": size, "relative": 1 / size}[kind]

    rows = [term(output, y[i], weight[i]) for i in range(len(weight))]
    columns = [term(input, x[j], weight[:, j]) for j in range(weight.shape[1])]
    return [
        [float(weight[i, j]) * (columns[j] + rows[i]) * x[j] ** alpha for j in range(len(columns))]
        for i in range(len(rows))
    ]


@pytest.mark.parametrize("p", [1, 2, 3.5])
@pytest.mark.parametrize("alpha", [0, 0.5])
@pytest.mark.parametrize("output", ["none", "constant", "activations", "weights", "relative"])
@pytest.mark.parametrize("input", ["none", "constant", "activations", "weights", "relative"])
def test_symwanda_formula(input: str, output: str, p: float, alpha: float) -> None:
    options = {"input": input, "output": output, "p": p, "alpha": alpha}
    if input == output == "none":
        with pytest.raises(RecipeError, match=r"both 'none'.*set it to"):
            parse_options(METRICS["symwanda"], options)
        return
    made = case(6, 12, 50)
    assert_scores(score("symwanda", made, options), symwanda_by_entry(made, input, output, p, alpha))


@pytest.mark.parametrize(("kind", "p"), [("relative", 1), ("weights", 2)])
def test_the_norm_that_symwanda_takes_by_itself(kind: str, p: float) -> None:
    options = {"input": kind, "output": kind}
    made = case()
    assert torch.equal(score("symwanda", made, options), score("symwanda", made, {**options, "p": p}))
    assert not torch.equal(score("symwanda", made, options), score("symwanda", made, {**options, "p": 3 - p}))


SPECIAL_CASES: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    ({"input": "constant", "output": "none"}, "magnitude", {}),
    ({"input": "none", "output": "constant"}, "magnitude", {}),
    ({"input": "activations", "output": "none"}, "wanda", {}),
    ({"input": "relative", "output": "relative", "p": 1, "alpha": 0.5}, "ria", {}),
    ({"input": "relative", "output": "relative", "alpha": 1}, "ria", {"alpha": 1}),
    ({"input": "relative", "output": "relative"}, "ria", {"alpha": 0}),
]


@pytest.mark.parametrize(("options", "name", "its_options"), SPECIAL_CASES)
@given(
    n=st.integers(1, 6),
    groups=st.integers(1, 6),
    tokens=st.sampled_from([1, 2, 30]),
    seed=st.integers(0, 50),
    flags=st.sets(st.sampled_from(FLAGS), max_size=3),
)
def test_special_cases_of_symwanda_are_equal_to_the_bit(
    options: dict[str, Any],
    name: str,
    its_options: dict[str, Any],
    n: int,
    groups: int,
    tokens: int,
    seed: int,
    flags: set[str],
) -> None:
    made = degenerate(n, 4 * groups, tokens, seed, frozenset(flags))
    assert torch.equal(score("symwanda", made, options), score(name, made, its_options))


def test_symwanda_is_the_loss_of_removing_one_weight_under_the_symmetric_objective() -> None:
    """‖X ΔWᵀ‖ + ‖Y ΔW‖ for each weight in turn; Y = 0 leaves Wanda, X = 0 its mirror image."""
    made = case(5, 8, 60)
    x, y = made.x.double(), made.y
    both, inputs, outputs = (
        score("symwanda", made, options) for options in ({}, {"output": "none"}, {"input": "none"})
    )
    for i in range(5):
        for j in range(8):
            delta = torch.zeros(5, 8, dtype=torch.float64)
            delta[i, j] = made.weight[i, j]
            lost_output, lost_input = float((x @ delta.T).norm()), float((y @ delta).norm())
            assert float(inputs[i, j]) == pytest.approx(lost_output, rel=1e-5)
            assert float(outputs[i, j]) == pytest.approx(lost_input, rel=1e-5)
            assert float(both[i, j]) == pytest.approx(lost_output + lost_input, rel=1e-5)


def test_weights_as_inputs_and_outputs_is_the_symmetric_objective_of_the_weights() -> None:
    """X = W and Y = Wᵀ in the shapes of this project: the norms of column j and row i."""
    made = case(6, 6)
    weight = made.weight.double()
    scores = score("symwanda", made, {"input": "weights", "output": "weights"})
    for i in range(6):
        for j in range(6):
            delta = torch.zeros(6, 6, dtype=torch.float64)
            delta[i, j] = weight[i, j]
            loss = (weight @ delta.T).norm() + (weight.T @ delta).norm()
            assert float(scores[i, j]) == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.parametrize("p", [6, 7, 30.5, 400, 1e6])
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e30])
def test_symwanda_of_any_norm(p: float, scale: float) -> None:
    """A high power of small weights is no number of float64; the norm comes close to the largest weight all the same."""
    made = case(6, 16)
    weight = (made.weight * scale).double().abs()
    tiny = Case(made.weight * scale, made.x, made.gradients, made.regional)

    def norm(values: Tensor) -> float:
        """By logarithms."""
        logs = p * values[values > 0].log()
        return float((torch.logsumexp(logs, dim=0) / p).exp())

    expected = [
        [float(w) * (1 / norm(column) + 1 / norm(row)) for w, column in zip(row, weight.T, strict=True)]
        for row in weight
    ]
    scores = score("symwanda", tiny, {"input": "relative", "output": "relative", "p": p})
    torch.testing.assert_close(scores.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=0)
    tiny.weight[2], tiny.weight[:, 3] = 0, 0
    zeros = score("symwanda", tiny, {"input": "relative", "output": "relative", "p": p})
    assert torch.isfinite(zeros).all()
    assert not zeros[2].any()


def test_symwanda_needs_what_its_sides_need() -> None:
    def needs(**options: Any) -> frozenset[str]:
        return METRICS["symwanda"].needs | parse_options(METRICS["symwanda"], options).needs

    assert needs() == {"sum_of_squares", "output_sum_of_squares"}
    assert needs(output="none") == {"sum_of_squares"}
    assert needs(input="none") == {"output_sum_of_squares"}
    assert needs(input="relative", output="weights") == frozenset()
    assert needs(input="relative", output="weights", alpha=0.5) == {"sum_of_squares"}
    recipe = Recipe.create(metric="symwanda", metric_options={"input": "constant"}, reconstruction="none")
    assert "output_sum_of_squares" in recipe.needs
    assert "sum_of_squares" not in recipe.needs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"p": 0.5}, "option 'p' of symwanda"),
        ({"p": float("inf")}, "option 'p' of symwanda"),
        ({"alpha": -1}, "option 'alpha' of symwanda"),
        ({"alpha": 50}, "option 'alpha' of symwanda"),
        ({"input": "weight"}, "option 'input' of symwanda"),
    ],
)
def test_symwanda_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.create(metric="symwanda", metric_options=options)
