"""Sums over the calibration inputs against float64, however the inputs are cut into batches."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compress import gram as gram_module
from compress.errors import NumericalError
from compress.gram import Gram, exact_products
from compress.statistics import SAMPLE_TOKENS, InputStatistics, positions_of_sample

EVERYTHING = ("sum", "sum_of_squares", "moments", "gram", "sample")
"""But "split_gram", which stands for "gram" where it is gathered: see `test_split_gram`."""


def inputs(t: int, k: int, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Correlated, with a mean, and with channels that are a hundred times larger than the others, as in real models."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(k, k, generator=generator) / k**0.5
    x = torch.randn(t, k, generator=generator) @ mixing + 0.4 * torch.randn(k, generator=generator)
    x[:, :: max(k // 3, 1)] *= 100
    return x.to(dtype)


def gathered(batches: list[Tensor], needs: tuple[str, ...] = EVERYTHING) -> InputStatistics:
    k = batches[0].shape[-1]
    statistics = InputStatistics(needs, k, tokens=sum(batch.numel() // k for batch in batches))
    for batch in batches:
        statistics.update(batch)
    return statistics


def gram_error(gram: Tensor, x: Tensor) -> float:
    """The largest error of an entry in units of sqrt(H_ii H_jj), which bounds that entry (Cauchy-Schwarz)."""
    exact = x.double().T @ x.double()
    scale = exact.diagonal().sqrt()
    return float(((gram.double() - exact).abs() / (scale[:, None] * scale)).max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("t", "k"), [(1, 8), (700, 48), (900, 96)])
def test_against_float64(dtype: torch.dtype, t: int, k: int) -> None:
    x = inputs(t, k, dtype=dtype)
    statistics = gathered([x[: t // 3], x[t // 3 :]])
    exact = x.double()
    assert statistics.count == t
    torch.testing.assert_close(
        statistics.sum, exact.sum(dim=0), rtol=0, atol=1e-6 * float(exact.abs().sum(dim=0).max())
    )
    torch.testing.assert_close(statistics.sum_of_squares, exact.square().sum(dim=0), rtol=2e-6, atol=0)
    assert gram_error(statistics.gram, x) < 1e-5
    assert statistics.gram.dtype == torch.float32


def test_gram_over_several_panels() -> None:
    """More columns than a panel, the last of them partial; symmetric to the bit."""
    x = inputs(300, 2 * Gram.panel + 72, dtype=torch.bfloat16)
    gram = gathered([x[:111], x[111:]], ("gram",)).gram
    assert gram_error(gram, x) < 1e-5
    assert torch.equal(gram, gram.T)


def test_gram_by_products_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """16-bit operands, float32 results, a panel at a time: over several panels and calls, against float64."""
    asked: list[torch.dtype] = []

    def product(a: Tensor, b: Tensor) -> Tensor:
        asked.extend([a.dtype, b.dtype])
        return a.float() @ b.float()

    monkeypatch.setattr(gram_module, "wide_product", lambda device, dtype: product)
    monkeypatch.setattr(gram_module.Gram, "panel", 48)
    x = torch.randn(300, 130, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    gram = gram_module.Gram(130, torch.device("cpu"), 300)
    for part in x.split(77):
        gram.update(part)
    exact = x.double().T @ x.double()
    torch.testing.assert_close(gram.value.double(), exact, rtol=1e-5, atol=1e-4)
    assert set(asked) == {torch.bfloat16}
    assert len(asked) == 2 * 3 * 4


@pytest.mark.parametrize("kind", ["right", "rounded", "missing", "unknown"])
def test_products_of_a_gpu_are_used_where_they_are_exact(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    def mm(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
        assert out_dtype is torch.float32
        if kind == "missing":
            raise RuntimeError("out_dtype is only supported for CUDA")
        if kind == "unknown":
            raise TypeError("mm() got an unexpected keyword argument 'out_dtype'")
        found = a.float() @ b.float()
        return found.to(torch.bfloat16).float() if kind == "rounded" else found

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(
        torch.Tensor,
        "to",
        lambda self, *how, to=torch.Tensor.to: self if isinstance(how[0], torch.device) else to(self, *how),
    )
    gram_module.wide_product.cache_clear()
    found = gram_module.wide_product(torch.device("cuda"), torch.bfloat16)
    assert (found is not None) == (kind == "right")
    assert gram_module.wide_product(torch.device("cuda"), torch.float32) is None
    assert gram_module.wide_product(torch.device("cpu"), torch.bfloat16) is None
    gram_module.wide_product.cache_clear()


def test_gram_of_float32_inputs_is_not_rounded_to_bfloat16() -> None:
    """Offsets below bfloat16's resolution: one ulp of rounding would be a hundred times the bound."""
    x = 1 + torch.rand(400, 64, generator=torch.Generator().manual_seed(0)) * 2e-3
    assert gram_error(gathered([x], ("gram",)).gram, x.bfloat16().float()) > 1e-4, "the test must see a difference"
    assert gram_error(gathered([x], ("gram",)).gram, x) < 1e-6


@given(cuts=st.lists(st.integers(0, 300), max_size=6), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_batches_do_not_matter(cuts: list[int], dtype: torch.dtype) -> None:
    x = inputs(300, 24, dtype=dtype)
    edges = [0, *sorted(cuts), 300]
    parts = [x[a:b] for a, b in itertools.pairwise(edges)]  # unequal, some of them empty
    whole, split = gathered([x]), gathered(parts)
    assert split.count == whole.count == 300
    scale = x.double().abs().sum(dim=0)
    assert float(((split.sum - whole.sum).abs() / scale).max()) < 1e-6
    torch.testing.assert_close(split.sum_of_squares, whole.sum_of_squares, rtol=1e-6, atol=0)
    assert gram_error(split.gram, x) < 1e-5
    assert torch.equal(split.sample, whole.sample)


# Moments


def pieces(x: Tensor, *cuts: int) -> list[Tensor]:
    """The rows of x cut into batches of unequal length."""
    return [x[a:b] for a, b in itertools.pairwise((0, *cuts, len(x)))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("t", "k"), [(2, 8), (700, 48), (900, 96)])
def test_moments_against_float64(dtype: torch.dtype, t: int, k: int) -> None:
    x = inputs(t, k, dtype=dtype)
    moments = gathered([x[: t // 3], x[t // 3 :]], ("moments",)).moments
    exact = x.double().numpy()
    spread = torch.from_numpy(exact.std(axis=0))
    assert (moments.mean.dtype, moments.variance.dtype) == (torch.float64, torch.float64)
    assert float(((moments.mean - torch.from_numpy(exact.mean(axis=0))).abs() / spread).max()) < 1e-6
    torch.testing.assert_close(moments.variance, torch.from_numpy(exact.var(axis=0, ddof=1)), rtol=1e-5, atol=0)


def test_moments_of_a_mean_ten_thousand_times_the_spread() -> None:
    """Batches of unequal length; Σx² − (Σx)²/T in float32 has no right digit left here."""
    generator = torch.Generator().manual_seed(3)
    x = 1e4 * torch.randn(40, generator=generator).sign() + torch.randn(1000, 40, generator=generator)
    exact = x.double().numpy()
    for batches in (pieces(x), pieces(x, 1, 2, 9, 500, 999), pieces(x, 613)):
        moments = gathered(batches, ("moments",)).moments
        torch.testing.assert_close(moments.variance, torch.from_numpy(exact.var(axis=0, ddof=1)), rtol=1e-5, atol=0)
        torch.testing.assert_close(moments.mean, torch.from_numpy(exact.mean(axis=0)), rtol=0, atol=1e-6)
    naive = (x.square().sum(dim=0) - x.sum(dim=0).square() / len(x)) / (len(x) - 1)
    assert float((naive - torch.from_numpy(exact.var(axis=0, ddof=1))).abs().max()) > 0.1, "the test must be hard"


@given(cuts=st.lists(st.integers(0, 300), max_size=6), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_batches_do_not_matter_for_moments(cuts: list[int], dtype: torch.dtype) -> None:
    x = inputs(300, 24, dtype=dtype) + 50
    whole, split = (gathered(batches, ("moments",)).moments for batches in ([x], pieces(x, *sorted(cuts))))
    torch.testing.assert_close(split.variance, whole.variance, rtol=1e-5, atol=0)
    assert float(((split.mean - whole.mean).abs() / whole.variance.sqrt()).max()) < 1e-6


def test_moments_of_few_tokens() -> None:
    one = gathered([inputs(1, 8)], ("moments",)).moments
    assert torch.equal(one.mean, inputs(1, 8)[0].double())
    assert not one.variance.any()
    none = gathered([inputs(0, 8)], ("moments",)).moments
    assert not none.mean.any()
    assert not none.variance.any()
    constant = gathered([torch.full((5, 3), 0.1), torch.full((2, 3), 0.1)], ("moments",)).moments
    torch.testing.assert_close(constant.mean, torch.full((3,), 0.1).double(), rtol=1e-7, atol=0)
    assert float(constant.variance.max()) < 1e-15


# Permuted inputs


def assert_statistics_of(statistics: InputStatistics, x: Tensor) -> None:
    """Within what float32 sums of columns in another place in memory may differ by."""
    other = gathered([x], EVERYTHING)
    size = x.double().square().mean(dim=0).sqrt()  # [K]
    assert statistics.count == other.count
    assert float(((statistics.sum - other.sum) / size).abs().max()) < 1e-6 * len(x)
    torch.testing.assert_close(statistics.sum_of_squares, other.sum_of_squares, rtol=1e-6, atol=0)
    assert float(((statistics.moments.mean - other.moments.mean) / size).abs().max()) < 1e-6
    torch.testing.assert_close(statistics.moments.variance, other.moments.variance, rtol=1e-5, atol=0)
    assert gram_error(statistics.gram, x) < 1e-5
    assert torch.equal(statistics.gram, statistics.gram.T)
    assert torch.equal(statistics.sample, x[positions_of_sample(len(x))])


@given(
    k=st.integers(1, 40),
    seed=st.integers(0, 100),
    cut=st.integers(0, 120),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_permuted_statistics_are_those_of_permuted_inputs(k: int, seed: int, cut: int, dtype: torch.dtype) -> None:
    """Of every statistic, whether it was read before or not; what comes afterwards is in the new order."""
    x = inputs(120, k, dtype=dtype, seed=seed)
    order = torch.randperm(k, generator=torch.Generator().manual_seed(seed))
    everything = EVERYTHING

    at_the_end = gathered([x[:cut], x[cut:]], everything)
    for name in EVERYTHING if seed % 2 else ():
        getattr(at_the_end, name)
    at_the_end.factors["inverse"] = "of the old order"
    at_the_end.permute(order)
    assert_statistics_of(at_the_end, x[:, order])
    assert not at_the_end.factors

    half_way = InputStatistics(everything, k, tokens=len(x))
    half_way.update(x[:cut])
    half_way.permute(order)
    half_way.update(x[cut:, order])
    assert_statistics_of(half_way, x[:, order])


def test_permutation_over_several_panels_and_back() -> None:
    x = inputs(60, Gram.panel + 40)
    order = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(0))
    statistics = gathered([x], EVERYTHING)
    before = gathered([x], EVERYTHING)
    statistics.permute(order)
    assert gram_error(statistics.gram, x[:, order]) < 1e-5
    assert not torch.equal(statistics.gram, before.gram)
    statistics.permute(order.argsort())
    for name in ("sum", "sum_of_squares", "gram", "sample"):
        assert torch.equal(getattr(statistics, name), getattr(before, name)), name
    assert all(map(torch.equal, statistics.moments, before.moments))


def test_batch_and_sequence_axes_are_tokens() -> None:
    x = inputs(60, 16)
    flat, shaped = gathered([x]), gathered([x.view(3, 20, 16)])
    assert shaped.count == 60
    assert torch.equal(shaped.gram, flat.gram)
    assert torch.equal(shaped.sum, flat.sum)
    assert torch.equal(shaped.sample, flat.sample)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_inputs_are_left_alone(dtype: torch.dtype) -> None:
    """They are the model's activations, and the layer that is watched reads them next."""
    x = inputs(30, 16, dtype=dtype)
    before = x.clone()
    gathered([x])
    assert torch.equal(x, before)


def test_the_sample_is_a_copy() -> None:
    x = inputs(30, 16)
    statistics = gathered([x], ("sample",))
    expected = x.clone()
    x.zero_()
    assert torch.equal(statistics.sample, expected)


@given(tokens=st.integers(1, 3000), cut=st.integers(0, 3000))
def test_the_sample_is_spread_evenly(tokens: int, cut: int) -> None:
    x = torch.arange(float(tokens))[:, None]
    cut = min(cut, tokens)
    rows = gathered([x[:cut], x[cut:]], ("sample",)).sample[:, 0]
    stride = max(1, tokens // SAMPLE_TOKENS)
    assert min(tokens, SAMPLE_TOKENS) <= len(rows) < 2 * SAMPLE_TOKENS
    assert (rows // stride).diff().eq(1).all(), "one of each stretch"
    assert tokens - rows[-1] <= 2 * stride, "up to the end"


@pytest.mark.parametrize("length", [40, 512, 2048])
def test_the_sample_has_every_place_of_a_window(length: int) -> None:
    """And the first one as often as it comes, not in a fourth of the rows."""
    tokens = 128 * 2048
    x = (torch.arange(tokens) % length).float()[:, None]
    places = gathered(list(x.split(3 * length)), ("sample",)).sample[:, 0] / length
    assert float((places == 0).float().mean()) <= 3 / length + 0.01
    quarters = torch.histc(places, 4, min=0, max=1) / len(places)
    assert (quarters - 0.25).abs().max() < 0.08


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("statistic", EVERYTHING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_non_finite_inputs_are_refused_with_the_layer(bad: float, statistic: str, dtype: torch.dtype) -> None:
    x = inputs(40, 16, dtype=dtype)
    gathered([x], (statistic,)).require_finite("model.layers.3.mlp.up_proj")
    x[7, 5] = bad
    with pytest.raises(NumericalError, match=r"model\.layers\.3\.mlp\.up_proj: .* NaN or infinity .*'" + statistic):
        gathered([x], (statistic,)).require_finite("model.layers.3.mlp.up_proj")


def test_only_declared_statistics() -> None:
    statistics = gathered([inputs(4, 8)], ("sum",))
    for name in ("gram", "sum_of_squares", "sample"):
        with pytest.raises(KeyError, match=f"{name}.* was not gathered"):
            getattr(statistics, name)
    with pytest.raises(KeyError, match="no statistic 'grams'; did you mean 'gram'"):
        InputStatistics({"grams"}, 8, tokens=1)


def precision() -> str:
    return torch.backends.mkldnn.matmul.fp32_precision


def test_exact_products_is_for_bfloat16_only_and_ends() -> None:
    before = precision()
    with exact_products(torch.bfloat16):
        assert precision() == "bf16"
        with exact_products(torch.bfloat16, torch.bfloat16):
            assert precision() == "bf16"
        assert precision() == "bf16"
    assert precision() == before
    for dtypes in [(torch.float32,), (torch.float16,), (torch.bfloat16, torch.float32)]:
        with exact_products(*dtypes):
            assert precision() == before


def test_exact_products_ends_after_an_exception() -> None:
    before = precision()
    with pytest.raises(ZeroDivisionError), exact_products(torch.bfloat16):
        raise ZeroDivisionError
    assert precision() == before


def test_gathering_leaves_the_global_setting() -> None:
    before = precision()
    gathered([inputs(8, 8, dtype=torch.bfloat16)])
    with pytest.raises(RuntimeError):
        Gram(8, torch.device("cpu"), 8).update(inputs(8, 9, dtype=torch.bfloat16))
    assert precision() == before
