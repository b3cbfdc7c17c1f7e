"""What holds for every metric; then magnitude, random and Wanda against their formulas and what they stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compress.errors import RecipeError
from compress.layer_statistics import KNOWN_NEEDS
from compress.methods import parse_options
from compress.metrics import METRICS
from compress.metrics.magnitude import magnitude
from compress.metrics.wanda import cumulative_share, wanda
from compress.patterns import NMPattern, Pattern, UnstructuredPattern
from compress.recipe import Recipe
from compress.statistics import InputStatistics
from tests.compress.metric_cases import ALL_NEEDS, VARIANT_IDS, VARIANTS, Case, case, score

every_variant = pytest.mark.parametrize(("name", "options"), VARIANTS, ids=VARIANT_IDS)
PATTERNS = [NMPattern(2, 4), NMPattern(1, 4), UnstructuredPattern(0.5), UnstructuredPattern(0.73)]


def layer(n: int = 12, k: int = 32, t: int = 200, seed: int = 0) -> tuple[Tensor, Tensor]:
    made = case(n, k, t, seed=seed)
    return made.weight, made.x


def gathered(x: Tensor, *needs: str) -> InputStatistics:
    statistics = InputStatistics(needs, x.shape[-1], tokens=len(x))
    statistics.update(x)
    return statistics


def degenerate(n: int, k: int, t: int, seed: int, flags: frozenset[str]) -> Case:
    """A case with what breaks formulas: rows, columns and inputs of zeros, ties, gradients that vanish."""
    made = case(n, k, t, samples=2, seed=seed)
    if "ties" in flags:
        made.weight = (made.weight * 10).sign() * 0.25
        made.x = made.x.round()
    if "zero row" in flags:
        made.weight[seed % n] = 0
    if "zero column" in flags:
        made.weight[:, seed % k] = 0
    if "zero weight" in flags:
        made.weight.zero_()
    if "tiny weight" in flags:
        made.weight *= 1e-37 / made.weight.abs().max().clamp(min=1e-30)
    if "dead input" in flags:
        made.x[:, (seed + 1) % k] = 0
    if "no input" in flags:
        made.x.zero_()
    if "constant input" in flags:
        made.x[:] = made.x[0]
    if "no gradient" in flags:
        made.gradients.zero_()
        made.regional.zero_()
    return made


FLAGS = [
    *["ties", "zero row", "zero column", "zero weight", "tiny weight"],
    *["dead input", "no input", "constant input", "no gradient"],
]


# Every metric


def test_the_variants_cover_every_metric() -> None:
    assert {name for name, _ in VARIANTS} == METRICS.keys()
    assert ALL_NEEDS == KNOWN_NEEDS


@every_variant
def test_metrics_leave_everything_alone_and_give_the_same_twice(name: str, options: dict[str, Any]) -> None:
    made = case()
    metric = METRICS[name]
    parsed = parse_options(metric, options)
    statistics = made.statistics()
    before = made.weight.clone()
    kept = {need: _copy(getattr(statistics, need)) for need in KNOWN_NEEDS}
    scores = metric.score(made.weight, statistics, parsed)
    assert metric.name == name
    assert (scores.shape, scores.dtype) == (made.weight.shape, torch.float32)
    assert scores.isfinite().all()
    assert (scores >= 0).all()
    assert torch.equal(metric.score(made.weight, statistics, parsed), scores)
    assert torch.equal(made.weight, before)
    for need, value in kept.items():
        assert all(map(torch.equal, value, _copy(getattr(statistics, need)))), need


def _copy(statistic: Any) -> list[Tensor]:
    """A statistic as tensors of their own."""
    if isinstance(statistic, tuple):
        return [tensor for part in statistic for tensor in _copy(part)]
    return [torch.as_tensor(statistic).clone()]


@every_variant
def test_metrics_declare_what_they_need_and_no_more(name: str, options: dict[str, Any]) -> None:
    metric = METRICS[name]
    parsed = parse_options(metric, options)
    needs = metric.needs | parsed.needs
    assert needs <= KNOWN_NEEDS
    made = [case(after_norm=after_norm) for after_norm in (False, True)]
    for one in made:
        metric.score(one.weight, one.statistics(needs), parsed)
    for need in needs:
        missed = 0
        for one in made:
            try:
                metric.score(one.weight, one.statistics(needs - {need}), parsed)
            except KeyError as error:
                missed += need in str(error)
        assert missed, f"{need} is declared and never read"


@pytest.mark.parametrize("name", sorted(METRICS))
def test_metrics_that_correct_the_bias_need_its_mean(name: str) -> None:
    metric = METRICS[name]
    assert not metric.corrects_bias or "moments" in metric.needs
    assert metric.corrects_bias == (name in {"stade", "stade-w"})


@every_variant
@given(
    n=st.integers(1, 6),
    groups=st.integers(1, 6),
    tokens=st.sampled_from([1, 2, 30]),
    seed=st.integers(0, 50),
    flags=st.sets(st.sampled_from(FLAGS), max_size=3),
)
def test_scores_are_finite_and_masks_keep_their_number(
    name: str, options: dict[str, Any], n: int, groups: int, tokens: int, seed: int, flags: set[str]
) -> None:
    made = degenerate(n, 4 * groups, tokens, seed, frozenset(flags))
    scores = score(name, made, options)
    assert scores.isfinite().all()
    assert (scores >= 0).all()
    for pattern in PATTERNS:
        for group in ("row", "layer"):
            mask = pattern.mask(scores, group)
            if isinstance(pattern, NMPattern):
                assert mask.unflatten(1, (-1, pattern.m)).sum(dim=2).eq(pattern.keep_n).all()
            else:
                competing = mask if group == "row" else mask.reshape(1, -1)
                assert (~competing).sum(dim=1).eq(round(pattern.sparsity * competing.shape[1])).all()


@pytest.mark.parametrize("name", sorted(METRICS.keys() - {"random"}))
def test_zero_weights_are_the_least_important(name: str) -> None:
    made = case(seed=3)
    zero = torch.rand(made.weight.shape, generator=torch.Generator().manual_seed(1)) < 0.3
    made.weight[zero] = 0
    scores = score(name, made)
    assert (scores[zero] == 0).all()
    if name != "pruner-zero":  # the smallest gradient of the layer scores zero, too
        assert (scores[~zero] > 0).all()


@pytest.mark.parametrize("name", sorted(METRICS.keys() - {"magnitude", "random", "pruner-zero"}))
def test_weights_of_dead_inputs_score_zero_where_only_the_input_counts(name: str) -> None:
    made = case(seed=3)
    made.x[:, 5] = 0
    made.gradients.zero_()
    made.regional.zero_()
    scores = score(name, made, {"output": "none"} if name == "symwanda" else {})
    assert (scores[:, 5] == 0).all()
    assert (scores[:, :5] > 0).all()


@pytest.mark.parametrize("name", sorted(METRICS))
@given(power=st.integers(-6, 6), seed=st.integers(0, 20))
def test_the_scale_of_the_weights_does_not_matter(name: str, power: int, seed: int) -> None:
    """Powers of two scale without rounding, so the masks are the same to the bit."""
    plain, scaled = case(4, 16, 40, seed=seed), case(4, 16, 40, seed=seed)
    scaled.weight *= 2.0**power
    statistics = plain.statistics()  # the gradients and outputs stay those of the unscaled layer
    metric = METRICS[name]
    scores = [metric.score(one.weight, statistics, metric.options()) for one in (plain, scaled)]
    for pattern in PATTERNS:
        assert torch.equal(pattern.mask(scores[0], metric.group), pattern.mask(scores[1], metric.group))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("wanda", {}),
        ("wanda", {"variant": True}),
        ("ria", {}),
        ("stochria", {}),
        ("stade", {}),
        ("stade-w", {}),
        ("symwanda", {}),
        ("gblm", {"scale": "free"}),
    ],
    ids=str,
)
@given(power=st.integers(-3, 3), seed=st.integers(0, 20))
def test_the_scale_of_the_inputs_does_not_matter(name: str, options: dict[str, Any], power: int, seed: int) -> None:
    """Powers of four, because RIA takes a root. The outputs scale with the inputs."""
    plain, scaled = case(4, 16, 40, seed=seed), case(4, 16, 40, seed=seed)
    scaled.x *= 4.0**power
    for pattern in PATTERNS:
        masks = [pattern.mask(score(name, one, options), METRICS[name].group) for one in (plain, scaled)]
        assert torch.equal(*masks)


@pytest.mark.parametrize("name", ["wanda", "ria", "symwanda", "wanda++", "pruner-zero"])
def test_the_number_of_samples_does_not_matter(name: str) -> None:
    """The same calibration twice."""
    once, twice = case(), case()
    twice.x = torch.cat([once.x, once.x])
    twice.gradients, twice.regional = (torch.cat([g, g]) for g in (once.gradients, once.regional))
    assert twice.statistics().windows == 2 * once.statistics().windows
    mask_once, mask_twice = (NMPattern(2, 4).mask(score(name, one)) for one in (once, twice))
    assert torch.equal(mask_once, mask_twice)


@every_variant
def test_the_data_matter(name: str, options: dict[str, Any]) -> None:
    """Every metric gives another mask than magnitude, or the tests above would see nothing."""
    made = case()
    pattern = UnstructuredPattern(0.5)
    same = torch.equal(*(pattern.mask(scores, "layer") for scores in (score(name, made, options), made.weight.abs())))
    assert same == (name == "magnitude")


# Magnitude


def test_magnitude_formula() -> None:
    weight, _ = layer()
    assert torch.equal(magnitude(weight), torch.maximum(weight, -weight))


# Random


def test_random_is_uniform_and_hangs_on_the_seed_alone() -> None:
    first, again, other = case(100, 200, seed=1), case(100, 200, seed=1), case(100, 200, seed=2)
    again.weight = again.weight.flip(0)
    again.x = again.x * 3
    scores = score("random", first)
    assert torch.equal(scores, score("random", again))
    assert not torch.equal(scores, score("random", other))
    assert not scores.equal(scores.sort(dim=1).values)
    counts = torch.histc(scores, bins=10, min=0, max=1)
    assert counts.sum() == scores.numel()
    assert float((counts - 2000).abs().max()) < 5 * 2000**0.5


# Wanda


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


# Wanda's variant


def bisected(scores: Tensor, pruned: int) -> Tensor:
    """The mask of the paper's code: one α for the layer by bisection, and in each row a threshold from it.

    Sorted cumulative sums up to α times the row's sum are pruned. The code stops at 0.1 % of sparsity; this goes
    on until the number is met.
    """
    ascending = scores.double().sort(dim=1).values
    cumulative, total = ascending.cumsum(dim=1), scores.double().sum(dim=1)

    def mask(alpha: float) -> Tensor:
        rows = []
        for row, sums, all_of_it, values in zip(scores.double(), cumulative, total, ascending, strict=True):
            count = int((sums <= alpha * all_of_it).sum())
            rows.append(row > values[count - 1] if count else torch.ones_like(row, dtype=torch.bool))
        return torch.stack(rows)

    low, high = 0.0, 1.0
    for _ in range(60):
        alpha = (low + high) / 2
        found = int((~mask(alpha)).sum())
        if found == pruned:
            return mask(alpha)
        low, high = (alpha, high) if found < pruned else (low, alpha)
    raise AssertionError(f"no alpha prunes {pruned} weights")


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.7, 0.93])
@pytest.mark.parametrize(("n", "k"), [(1, 16), (12, 32), (40, 101)])
def test_the_variant_equals_the_bisection_of_the_paper(n: int, k: int, sparsity: float) -> None:
    made = case(n, k)
    pattern: Pattern = UnstructuredPattern(sparsity)
    mask = pattern.mask(score("wanda", made, {"variant": True}), "layer")
    assert torch.equal(mask, bisected(score("wanda", made), round(sparsity * n * k)))
    assert torch.equal(mask, pattern.mask(score("wanda", made), "row")) == (n == 1)


def test_the_variant_by_hand() -> None:
    """Shares of 1, 3 and 6 tenths; and of a row of zeros."""
    scores = torch.tensor([[3.0, 1.0, 6.0], [0.0, 0.0, 0.0], [2.0, 2.0, 0.0]])
    expected = torch.tensor([[0.4, 0.1, 1.0], [0.0, 0.0, 0.0], [0.5, 1.0, 0.0]])
    torch.testing.assert_close(cumulative_share(scores), expected)


@given(n=st.integers(1, 6), k=st.integers(1, 24), seed=st.integers(0, 100), scale=st.floats(1e-30, 1e30))
def test_shares_are_in_the_order_of_the_scores(n: int, k: int, seed: int, scale: float) -> None:
    scores = (torch.randn(n, k, generator=torch.Generator().manual_seed(seed)).abs() * scale).round(decimals=1)
    share = cumulative_share(scores)
    for row, shares in zip(scores, share, strict=True):
        order = row.argsort(stable=True)
        assert (shares[order].diff() >= 0).all()
        assert float(shares.max()) == (1.0 if row.any() else 0.0)


def test_the_variant_in_a_recipe() -> None:
    unstructured: dict[str, Any] = {"pattern": "unstructured", "sparsity": 0.5, "format": "dense", "metric": "wanda"}
    assert Recipe.create(**unstructured).chosen_group == "row"
    assert Recipe.create(**unstructured, metric_options={"variant": True}).chosen_group == "layer"
    assert Recipe.create(metric="wanda", metric_options={"variant": False}).pattern == "2:4"
    with pytest.raises(RecipeError, match=r"variant=true of wanda .* 2:4 fixes that; .*--pattern unstructured"):
        Recipe.create(metric="wanda", metric_options={"variant": True})
