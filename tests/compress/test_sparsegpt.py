"""SparseGPT against the paper's algorithm, written down again in float64 with nothing but inverses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from compress import linalg
from compress.errors import NumericalError
from compress.layer_statistics import LayerStatistics
from compress.layers import relative_output_error
from compress.linalg import InverseFactor, inverse_factor
from compress.methods import Pruning, Reconstructed
from compress.metrics.magnitude import magnitude
from compress.metrics.wanda import wanda
from compress.patterns import NMPattern, Pattern, UnstructuredPattern, parse_pattern
from compress.reconstruction.sparsegpt import SPARSEGPT, SparseGPTOptions, sparsegpt
from compress.statistics import InputStatistics
from tests.compress.layers import damped, gathered, layer

DAMPING = 0.01
BLOCK = 128


pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass
class Reference:
    weight: Tensor
    mask: Tensor
    margin: float
    """The closest decision: the smallest relative distance between a score that was kept and one that was pruned."""


def reference(
    weight: Tensor, x: Tensor, pattern: Pattern, group: str = "block", given: Tensor | None = None
) -> Reference:
    """Algorithm 1 of arXiv 2301.00774, column by column in float64.

    No Cholesky factor: ``inverse`` is the inverse of H restricted to the columns from j on. Eliminating a column
    from an inverse is one step of Gauss. Its first diagonal entry is U_jj² of the paper, its first row U_jj U_j:.
    """
    hessian, dead = damped(x, DAMPING)
    w = weight.double().clone()
    w[:, dead] = 0
    n, k = w.shape
    inverses = [torch.linalg.inv(hessian)]
    for _ in range(k - 1):
        last = inverses[-1]
        inverses.append(last[1:, 1:] - last[1:, :1] * last[:1, 1:] / last[0, 0])
    loss_scale = torch.stack([inverse[0, 0] for inverse in inverses])

    mask = torch.ones(n, k, dtype=torch.bool) if given is None else given
    margin = float("inf")

    def choose(rows: Tensor, kept: int) -> Tensor:
        """Keeps the ``kept`` best of each of the rows."""
        nonlocal margin
        values, order = rows.sort(dim=1, descending=True, stable=True)
        if 0 < kept < rows.shape[1]:
            gap = (values[:, kept - 1] - values[:, kept]) / values[:, kept - 1].clamp(min=1e-300)
            both_zero = values[:, kept - 1] == 0
            margin = min(margin, float(gap.masked_fill(both_zero, torch.inf).min()))
        return torch.zeros_like(rows, dtype=torch.bool).scatter(1, order[:, :kept], True)

    for j in range(k):
        if given is None and isinstance(pattern, NMPattern) and j % pattern.m == 0:
            span = slice(j, j + pattern.m)
            mask[:, span] = choose(w[:, span] ** 2 / loss_scale[span], pattern.keep_n)
        if given is None and isinstance(pattern, UnstructuredPattern) and j % BLOCK == 0:
            span = slice(j, min(j + BLOCK, k))
            scores = w[:, span] ** 2 / loss_scale[span]
            competing = scores if group == "row" else scores.reshape(1, -1)
            count = competing.shape[1]
            mask[:, span] = choose(competing, count - round(pattern.sparsity * count)).view(scores.shape)
        removed = w[:, j] * ~mask[:, j]
        w[:, j:] -= removed[:, None] / inverses[j][0, 0] * inverses[j][0]
    return Reference(w * mask, mask, margin)


def run(
    weight: Tensor,
    statistics: LayerStatistics,
    pattern: Pattern,
    group: str = "block",
    given: Tensor | None = None,
    **options: float,
) -> Reconstructed:
    chosen = SparseGPTOptions.model_validate({"damping": DAMPING, **options})
    return sparsegpt(weight, Pruning(pattern, group, given), statistics, chosen)  # type: ignore[arg-type]


def clear_case(
    n: int,
    k: int,
    t: int,
    pattern: Pattern,
    group: str,
    given: Callable[[Tensor, LayerStatistics], Tensor] | None = None,
) -> tuple[Tensor, LayerStatistics, Tensor | None, Reference]:
    """The first seed for which no decision is so close that float32 may take it the other way."""
    for seed in range(20):
        weight, x = layer(n, k, t, seed)
        statistics = gathered(x)
        mask = given(weight, statistics) if given else None
        expected = reference(weight, x, pattern, group, mask)
        if expected.margin > 1e-4:
            return weight, statistics, mask, expected
    raise AssertionError("no clear case among 20 seeds")


def assert_same(result: Reconstructed, expected: Reference) -> None:
    assert torch.equal(result.mask, expected.mask)
    assert not result.weight[~result.mask].any()
    assert float((result.weight.double() - expected.weight).abs().max() / expected.weight.abs().max()) < 1e-4


def test_the_reference_eliminates_correctly() -> None:
    """Its running inverse is the inverse of the rest of the matrix: one row with one pruned column, by hand."""
    weight, x = layer(1, 12, 100)
    hessian, _ = damped(x, DAMPING)
    given = torch.ones(1, 12, dtype=torch.bool)
    given[0, 4] = False
    inverse = torch.linalg.inv(hessian[4:, 4:])
    expected = weight.double().clone()
    expected[0, 4:] -= expected[0, 4] / inverse[0, 0] * inverse[0]
    torch.testing.assert_close(
        reference(weight, x, NMPattern(11, 12), given=given).weight, expected, rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4", "3:4"])
@pytest.mark.parametrize(("n", "k", "t"), [(1, 8, 40), (7, 72, 300), (1, 128, 400), (5, 136, 500), (6, 264, 800)])
def test_nm_equals_the_paper(pattern: str, n: int, k: int, t: int) -> None:
    weight, statistics, _, expected = clear_case(n, k, t, parse_pattern(pattern), "block")
    assert_same(run(weight, statistics, parse_pattern(pattern)), expected)


def test_groups_that_do_not_divide_the_block() -> None:
    """Blocks of 128 columns would cut groups of 12; and groups longer than a block have to work."""
    weight, statistics, _, expected = clear_case(4, 264, 700, NMPattern(5, 12), "block")
    assert_same(run(weight, statistics, NMPattern(5, 12)), expected)
    assert_same(run(weight, statistics, NMPattern(5, 12), block_size=4), expected)


@pytest.mark.parametrize("group", ["row", "block"])
@pytest.mark.parametrize(("n", "k", "t"), [(1, 40, 200), (6, 77, 300), (4, 128, 400), (6, 301, 900)])
@pytest.mark.parametrize("sparsity", [0.5, 0.7])
def test_unstructured_equals_the_paper(group: str, n: int, k: int, t: int, sparsity: float) -> None:
    pattern = UnstructuredPattern(sparsity)
    weight, statistics, _, expected = clear_case(n, k, t, pattern, group)
    assert_same(run(weight, statistics, pattern, group), expected)


def wanda_mask(pattern: Pattern, group: str = "row") -> Callable[[Tensor, LayerStatistics], Tensor]:
    return lambda weight, statistics: pattern.mask(wanda(weight, statistics), group)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("pattern", "group"),
    [
        (NMPattern(2, 4), "row"),
        (UnstructuredPattern(0.5), "row"),
        (UnstructuredPattern(0.5), "layer"),
    ],
    ids=str,
)
@pytest.mark.parametrize(("n", "k", "t"), [(1, 8, 40), (6, 264, 800)])
def test_a_given_mask_is_kept_and_repaired(pattern: Pattern, group: str, n: int, k: int, t: int) -> None:
    weight, statistics, mask, expected = clear_case(n, k, t, pattern, group, wanda_mask(pattern, group))
    assert mask is not None
    before = mask.clone()
    assert_same(run(weight, statistics, pattern, group, mask), expected)
    assert torch.equal(mask, before)


@pytest.mark.parametrize("seed", range(3))
def test_repair_and_own_metric_pay(seed: int) -> None:
    """In output error: own metric < Wanda's mask repaired or not < magnitude, and repair always helps."""
    weight, x = layer(48, 160, 2000, seed)
    statistics, pattern = gathered(x), NMPattern(2, 4)

    def error(pruned: Tensor) -> float:
        return relative_output_error(weight, pruned, x)

    own = error(run(weight, statistics, pattern).weight)
    errors = {}
    for name, scores in {"wanda": wanda(weight, statistics), "magnitude": magnitude(weight)}.items():
        mask = pattern.mask(scores)
        errors[name] = error(weight * mask)
        repaired = error(run(weight, statistics, pattern, given=mask).weight)
        assert repaired < 0.95 * errors[name], name
    assert own < 0.95 * errors["wanda"]
    assert errors["wanda"] < errors["magnitude"]


def test_dead_inputs() -> None:
    weight, x = layer(6, 72, 400, seed=1)
    dead = [0, 9, 10, 11, 71]  # the first, most of a group, the last
    x[:, dead] = 0
    result = run(weight, gathered(x), NMPattern(2, 4))
    expected = reference(weight, x, NMPattern(2, 4))
    assert expected.margin > 1e-4
    assert_same(result, expected)
    assert not result.weight[:, dead].any()
    assert result.notes["dead_inputs"] == len(dead)
    kept = torch.ones(6, 72, dtype=torch.bool)
    assert not run(weight, gathered(x), NMPattern(2, 4), given=kept).weight[:, dead].any()


def test_all_inputs_dead() -> None:
    result = run(torch.randn(3, 16), gathered(torch.zeros(20, 16)), NMPattern(2, 4))
    assert not result.weight.any()
    assert result.mask.view(3, 4, 4).sum(dim=2).eq(2).all()


@pytest.mark.parametrize("tokens", [1, 10, 60])
def test_fewer_tokens_than_channels(tokens: int) -> None:
    """The Gram matrix is singular; the ridge is what makes it invertible, and no higher one is needed."""
    pattern = NMPattern(2, 4)
    weight, statistics, _, expected = clear_case(5, 96, tokens, pattern, "block")
    result = run(weight, statistics, pattern)
    assert_same(result, expected)
    assert result.notes["damping"] == DAMPING
    assert "damping_raised_from" not in result.notes
    assert result.notes["tokens_per_input"] == pytest.approx(tokens / 96, abs=1e-3)
    assert result.notes["warning"].startswith(f"{tokens / 96:.2g} calibration tokens per input channel are few")


@pytest.mark.parametrize(("tokens", "chosen"), [(127, 0.1), (128, 0.01), (1000, 0.01)])
def test_the_damping_is_chosen_by_the_tokens_per_input(tokens: int, chosen: float) -> None:
    """0.01 as in the paper; 0.1 for fewer than four tokens per input channel, with a warning."""
    weight, x = layer(4, 32, tokens)
    left_out = sparsegpt(weight, Pruning(NMPattern(2, 4), "block", None), gathered(x), SparseGPTOptions())
    asked = run(weight, gathered(x), NMPattern(2, 4), damping=chosen)
    assert left_out.notes["damping"] == chosen
    assert ("warning" in left_out.notes) is (tokens < 128)
    assert torch.equal(left_out.weight, asked.weight)


def with_gram(gram: Tensor) -> LayerStatistics:
    """A Gram matrix that no inputs have, as if 100 tokens had given it."""
    statistics = gathered(torch.zeros(100, len(gram)))
    vars(statistics.inputs)["gram"] = gram
    return statistics


def test_a_damping_that_had_to_be_raised_is_noted() -> None:
    basis = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0))).Q
    gram = (basis * torch.linspace(-0.05, 2.05, 16)) @ basis.T
    weight = torch.randn(3, 16)
    result = run(weight, with_gram(gram), NMPattern(2, 4))
    assert result.notes == {"damping": pytest.approx(0.1), "damping_raised_from": 0.01, "tokens_per_input": 6.25}
    assert bool(torch.isfinite(result.weight).all())


def test_no_way_to_factor_is_an_error() -> None:
    gram = torch.eye(16)
    gram[2, 3] = gram[3, 2] = float("nan")
    with pytest.raises(NumericalError, match="cannot be factored"):
        run(torch.randn(3, 16), with_gram(gram), NMPattern(2, 4))


def test_layers_of_one_input_share_the_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counting(gram: Tensor, damping: float) -> InverseFactor:
        calls.append(damping)
        return inverse_factor(gram, damping)

    monkeypatch.setattr(linalg, "inverse_factor", counting)
    weight, x = layer(6, 32, 200)
    statistics = gathered(x)
    first = run(weight, statistics, NMPattern(2, 4))
    again = run(weight, statistics, NMPattern(2, 4))
    run(weight[:3], statistics, NMPattern(1, 4))
    assert calls == [DAMPING]
    assert torch.equal(first.weight, again.weight)
    run(weight, statistics, NMPattern(2, 4), damping=0.1)
    assert calls == [DAMPING, 0.1]
    run(weight, gathered(x), NMPattern(2, 4))
    assert len(calls) == 3


@pytest.mark.parametrize(("pattern", "group"), [(NMPattern(2, 4), "block"), (UnstructuredPattern(0.5), "row")], ids=str)
def test_rows_are_independent(pattern: Pattern, group: str) -> None:
    """Up to the rounding of matrix products, whose order of additions hangs on their shape."""
    weight, statistics, _, expected = clear_case(12, 136, 400, pattern, group)
    for rows in (slice(0, 1), slice(3, 4), slice(5, 12)):
        part = run(weight[rows], statistics, pattern, group)
        assert_same(part, Reference(expected.weight[rows], expected.mask[rows], expected.margin))


@pytest.mark.parametrize("block_size", [1, 8, 24, 100, 128, 4096])
def test_the_block_size_is_a_matter_of_speed(block_size: int) -> None:
    pattern = NMPattern(2, 4)
    weight, statistics, _, expected = clear_case(5, 136, 500, pattern, "block")
    assert_same(run(weight, statistics, pattern, block_size=block_size), expected)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "single row"])
def test_the_weight_is_left_alone(layout: str) -> None:
    """Also where the transpose that it works on is contiguous already: a Conv1D's weight, or a single row."""
    weight, x = layer(1 if layout == "single row" else 6, 32, 200)
    if layout == "transposed":
        weight = weight.T.contiguous().T
    before = weight.clone()
    for given in (None, NMPattern(2, 4).mask(weight.abs())):
        run(weight, gathered(x), NMPattern(2, 4), given=given)
        assert torch.equal(weight, before)


def test_more_damping_changes_the_weights_less() -> None:
    weight, x = layer(6, 64, 300)
    statistics = gathered(x)
    mask = NMPattern(2, 4).mask(wanda(weight, statistics))
    moved = [
        float((run(weight, statistics, NMPattern(2, 4), given=mask, damping=damping).weight - weight * mask).norm())
        for damping in (0.001, 0.01, 0.1, 1.0)
    ]
    assert moved == sorted(moved, reverse=True)


def test_registered_with_what_it_needs() -> None:
    assert SPARSEGPT.needs == {"gram"}
    assert SPARSEGPT.own_metric
    weight, x = layer(4, 16, 100)
    only_gram = InputStatistics(SPARSEGPT.needs, 16, tokens=100)
    only_gram.update(x)
    run(weight, LayerStatistics(only_gram), NMPattern(2, 4))
