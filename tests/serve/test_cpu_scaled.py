"""The C++ kernels for values of 8 bits with scales against float64, on every code path that this processor has; with x as it is, and with x
that is rounded to such values, too (what that alone is about is in test_cpu_quantized.py)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.packed import PackedWeight, pack, quantize
from serve.kernels import plain
from serve.kernels.cpu import backend, library
from serve.kernels.proof import problem
from tests.serve.cpu_reference import (
    DTYPES,
    PATTERNS,
    Expected,
    dot_flushes,
    expected_quantized,
    expected_scaled,
    kept_columns,
    normal,
    random_scaled,
)
from tests.serve.test_cpu_kernels import KERNELS, MANY, path, poisoned

pytestmark = pytest.mark.skipif(library.load() is None, reason=library.status())
__all__ = ["path", "poisoned"]  # fixtures

SCALED = (torch.int8, torch.float8_e4m3fn)
OF_X = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
OF_VALUES = pytest.mark.parametrize("values", SCALED, ids=lambda dtype: str(dtype).removeprefix("torch."))


EITHER = pytest.mark.parametrize("quantizes_x", [False, True], ids=["x as it is", "x rounded"])


def scaled(n: int, k: int, values: torch.dtype, quantizes_x: bool, seed: int = 0) -> PackedWeight:
    return replace(random_scaled(n, k, values, seed), quantizes_x=quantizes_x)


def wanted(path: str, x: Tensor, packed: PackedWeight, bias: Tensor | None, few_rows: int) -> Expected:
    """Rows of x that stay as they are may be rounded to 16 bits where few of them, themselves of 16 bits, meet int8."""
    if packed.quantizes_x:
        return expected_quantized(x, packed, bias, flushes=dot_flushes(path, x.dtype))
    few = len(x) <= (backend.few_rows(packed.values.dtype) if few_rows < 0 else few_rows)
    integers = few and packed.values.dtype == torch.int8 and x.dtype != torch.float32 and path != "portable"
    return expected_scaled(x, packed, bias, flushes=dot_flushes(path, x.dtype), integers=integers)


def check(path: str, x: Tensor, packed: PackedWeight, bias: Tensor | None, few_rows: int) -> None:
    y = backend.linear(x, backend.prepare(packed), bias, len(packed.values), few_rows)
    assert y.dtype == x.dtype
    assert not wanted(path, x, packed, bias, few_rows).wrong(y).any(), (x.shape, packed.shape, bias is not None)


@OF_X
@OF_VALUES
@EITHER
@KERNELS
class TestEveryProduct:
    def test_every_number_of_rows_of_x(
        self, path: str, dtype: torch.dtype, values: torch.dtype, quantizes_x: bool, few_rows: int
    ) -> None:
        packed, bias = scaled(37, 104, values, quantizes_x), normal(37, dtype=dtype, seed=2)
        x = normal(161, 104, dtype=dtype, seed=1)
        for m in (*range(1, 40), 64, 65, 79, 80, 81, 130, 161):
            check(path, x[:m], packed, bias if m % 2 else None, few_rows)

    def test_every_number_of_outputs(
        self, path: str, dtype: torch.dtype, values: torch.dtype, quantizes_x: bool, few_rows: int
    ) -> None:
        for n in range(1, 131, 3):
            check(path, normal(1 + n % 7, 72, dtype=dtype), scaled(n, 72, values, quantizes_x, n), None, few_rows)

    def test_every_number_of_inputs(
        self, path: str, dtype: torch.dtype, values: torch.dtype, quantizes_x: bool, few_rows: int
    ) -> None:
        for k in range(8, 201, 8):
            packed = scaled(21, k, values, quantizes_x, k)
            for m in (1, 4, 19):
                check(path, normal(m, k, dtype=dtype, seed=k), packed, None, few_rows)

    def test_more_than_a_part(
        self, path: str, dtype: torch.dtype, values: torch.dtype, quantizes_x: bool, few_rows: int
    ) -> None:
        for m, n, k in ((3, 1111, 64), (17, 530, 8), (2, 70, 2088), (90, 70, 1032), (7, 20, 1024)):
            packed = scaled(n, k, values, quantizes_x)
            check(path, normal(m, k, dtype=dtype), packed, normal(n, dtype=dtype), few_rows)

    def test_all_pairs_of_patterns(
        self, path: str, dtype: torch.dtype, values: torch.dtype, quantizes_x: bool, few_rows: int
    ) -> None:
        bytes_ = torch.tensor([low | high << 4 for low in PATTERNS for high in PATTERNS], dtype=torch.uint8)
        mask = torch.stack([bytes_.roll(shift) for shift in range(20)])
        packed = replace(scaled(20, 288, values, quantizes_x), mask=mask)
        check(path, normal(9, 288, dtype=dtype), packed, None, few_rows)

    def test_the_number_of_threads_changes_no_bit(
        self, path: str, dtype: torch.dtype, values: torch.dtype, quantizes_x: bool, few_rows: int
    ) -> None:
        packed, bias = scaled(600, 136, values, quantizes_x), normal(600, dtype=dtype)
        first: dict[int, Tensor] = {}
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            stream = backend.prepare(packed)
            for m in (1, 5, 23, 170):
                y = backend.linear(normal(m, 136, dtype=dtype, seed=m), stream, bias, 600, few_rows)
                assert torch.equal(first.setdefault(m, y), y), (m, threads)


@OF_X
@OF_VALUES
@KERNELS
class TestProducts:
    @pytest.mark.parametrize("outlier", [100.0, 1e4])
    def test_columns_of_different_sizes(
        self, path: str, dtype: torch.dtype, values: torch.dtype, few_rows: int, outlier: float
    ) -> None:
        """As activations of language models have them; each 64 columns have a power of two of their own."""
        x = normal(6, 328, dtype=torch.float32)
        x[:, 5] *= outlier
        x[:, 64:128] *= 1e-3
        check(path, x.to(dtype), random_scaled(33, 328, values), None, few_rows)

    def test_zeros_and_tiny_inputs(self, path: str, dtype: torch.dtype, values: torch.dtype, few_rows: int) -> None:
        packed = random_scaled(33, 136, values)
        for factor in (0.0, -0.0, 2.0**-14, 2.0**-100 if dtype != torch.float16 else 2.0**-20):
            check(path, normal(5, 136, dtype=dtype) * factor, packed, None, few_rows)

    def test_large_inputs(self, path: str, dtype: torch.dtype, values: torch.dtype, few_rows: int) -> None:
        packed = random_scaled(33, 136, values)
        factor = 2.0 if dtype == torch.float16 else 2.0**90
        check(path, normal(5, 136, dtype=dtype) * factor, packed, None, few_rows)

    def test_what_is_not_finite(self, path: str, dtype: torch.dtype, values: torch.dtype, few_rows: int) -> None:
        """It shows in every output that keeps its column, and in no other row of x."""
        packed = random_scaled(35, 136, values)
        stream = backend.prepare(packed)
        for special in (torch.inf, -torch.inf, torch.nan):
            for column in (0, 31, 32, 63, 64, 135):
                x = normal(18, 136, dtype=dtype)
                x[3, column] = special
                y = backend.linear(x, stream, None, 35, few_rows)
                kept = (kept_columns(packed.mask) == column).any(-1)
                assert kept.any()
                assert not y[3, kept].isfinite().any()
                assert y[:3].isfinite().all()
                assert y[4:].isfinite().all()


@settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    m=st.integers(1, 200), n=st.integers(1, 140), k=st.integers(1, 24), dtype=st.sampled_from(DTYPES),
    values=st.sampled_from(SCALED), quantizes_x=st.booleans(), few_rows=st.sampled_from([-1, 0, MANY]), with_bias=st.booleans(),
    threads=st.integers(1, 3), seed=st.integers(0, 1000),
)  # fmt: skip
def test_fuzzed(
    path: str,
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    values: torch.dtype,
    quantizes_x: bool,
    few_rows: int,
    with_bias: bool,
    threads: int,
    seed: int,
) -> None:
    torch.set_num_threads(threads)
    x, bias = normal(m, 8 * k, dtype=dtype, seed=seed), normal(n, dtype=dtype, seed=seed) if with_bias else None
    packed = scaled(n, 8 * k, values, quantizes_x, seed)
    y = backend.linear(x, backend.prepare(packed), bias, n, few_rows)
    # (which kernel a negative number of few rows takes depends on the path, too, so the wider bound holds for either)
    assert not wanted(path, x, packed, bias, MANY if few_rows < 0 else few_rows).wrong(y).any()


@OF_VALUES
@KERNELS
def test_all_values_are_exact(path: str, values: torch.dtype, few_rows: int) -> None:
    """A single product of a value and a power of two, with a scale of one, is the value."""
    codes = torch.arange(256, dtype=torch.uint8).view(256, 1).repeat(1, 4)
    codes[(codes == 0x80) | ((codes & 0x7F == 0x7F) & (values != torch.int8))] = 0
    packed = PackedWeight(codes.view(values), torch.full((256, 1), 0x33, dtype=torch.uint8), torch.ones(256, 1))
    stream = backend.prepare(packed)
    for dtype in DTYPES:
        for column, kept in ((0, 0), (1, 1), (4, 2), (5, 3)):
            x = torch.zeros(2, 8, dtype=dtype)
            x[1, column] = 0.5
            y = backend.linear(x, stream, None, 256, few_rows)
            assert y[0].eq(0).all()
            assert torch.equal(y[1].double(), packed.values[:, kept].double() / 2)


@OF_VALUES
@pytest.mark.parametrize("n", [1, 15, 16, 17, 100])
def test_prepare_restore_expand(path: str, values: torch.dtype, n: int) -> None:
    for k in (8, 24, 32, 40, 136):
        packed = random_scaled(n, k, values, seed=n)
        assert packed.scale is not None
        stream = backend.prepare(packed)
        assert backend.describe(stream) == (values, n, k, False)
        back = backend.restore(stream)
        assert torch.equal(back.values.view(torch.uint8), packed.values.view(torch.uint8))
        assert torch.equal(back.mask, packed.mask)
        assert back.scale is not None
        assert torch.equal(back.scale, packed.scale)
        for dtype in DTYPES:
            dense = plain.expand(packed, dtype)
            for first, rows in ((0, n), (n // 2, n - n // 2), (n - 1, 1), (n, 0)):
                out = torch.empty(rows, k, dtype=dtype)
                backend.expand(stream, first, rows, out)
                assert torch.equal(out, dense[first : first + rows])


@OF_VALUES
def test_it_takes_five_sixteenths_of_dense_bfloat16(values: torch.dtype) -> None:
    packed = random_scaled(1024, 2048, values)
    assert backend.prepare(packed).numel() == 1024 * 2048 * 2 * 5 // 16 + 1024 * 4 + 64


@OF_VALUES
@pytest.mark.parametrize("fault", ["another scale", "values swapped", "another sign"])
def test_the_bound_finds(path: str, values: torch.dtype, fault: str) -> None:
    x, packed = normal(40, 512, dtype=torch.bfloat16), random_scaled(64, 512, values)
    packed.values[:, 6:8] = torch.tensor([64.0, -96.0]).to(values)  # (random ones may be too small to be missed)
    bound = wanted(path, x, packed, None, MANY)
    stored, scale = packed.values.view(torch.uint8).clone(), packed.scale
    assert scale is not None
    if fault == "another scale":
        scale = scale.roll(1, 0)
    elif fault == "values swapped":
        stored[:, 6:8] = stored[:, [7, 6]]
    else:
        stored[:, 6] = (packed.values[:, 6].float() * -1).to(values).view(torch.uint8)
    wrong = PackedWeight(stored.view(values), packed.mask, scale)
    for few_rows in (MANY, 0):
        assert not bound.wrong(backend.linear(x, backend.prepare(packed), None, 64, few_rows)).any()
        assert bound.wrong(backend.linear(x, backend.prepare(wrong), None, 64, few_rows)).float().mean() > 0.75


@OF_VALUES
def test_rounding_a_weight_changes_a_product_little(path: str, values: torch.dtype) -> None:
    """End to end: what `quantize` makes of a weight gives nearly the product of that weight."""
    known = problem(4, 64, 512, torch.bfloat16)
    packed = pack(known.weight)
    y = backend.linear(known.x, backend.prepare(quantize(packed, values)), known.bias, 64).double()
    exact = known.x.double() @ known.weight.double().T + known.bias.double()
    off = (y - exact).norm() / exact.norm()
    assert off < (0.01 if values == torch.int8 else 0.04)


@OF_VALUES
def test_refusals(path: str, values: torch.dtype) -> None:
    packed = random_scaled(16, 32, values)
    stream = backend.prepare(packed)
    with pytest.raises(ValueError, match=r"takes floats \[\.\.\., 32\]"):
        backend.linear(torch.zeros(1, 40), stream, None, 16)
    with pytest.raises(ValueError, match="a floating-point dtype"):
        backend.expand(stream, 0, 16, torch.empty(16, 32, dtype=torch.int8))
    other = backend.prepare(PackedWeight(normal(16, 16, dtype=torch.bfloat16), packed.mask))
    with pytest.raises(ValueError, match=r"takes torch\.bfloat16"):
        backend.linear(torch.zeros(1, 32), other, None, 16)
    with pytest.raises(ValueError, match="no prepared weight"):
        backend.linear(torch.zeros(1, 32), stream[:-64].contiguous(), None, 16)
