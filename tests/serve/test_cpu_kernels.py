"""The C++ kernels for processors against float64, on every code path that this processor has.

Every test runs in memory that is filled with NaN before it is used, so what is read before it is written shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.packed import PackedWeight, unpack
from serve.kernels.cpu import backend, library
from tests.serve.cpu_reference import (
    DTYPES,
    PATTERNS,
    Expected,
    dot_flushes,
    expected,
    expected_dense,
    kept_columns,
    normal,
    random_mask,
    random_weight,
)

pytestmark = pytest.mark.skipif(library.load() is None, reason=library.status())

MANY = 1 << 40
KERNELS = pytest.mark.parametrize("few_rows", [MANY, 0], ids=["few", "many"])
OF_EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
LARGEST = 130


@pytest.fixture(params=backend.PATHS)
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param not in library.paths():
        pytest.skip(f"this processor cannot run the code path {request.param}")
    with backend.using(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """New memory holds NaN, and bytes 255, which are NaN in every dtype. One thread: teams wait long on a busy machine."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    before, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    assert torch.empty(1000).isnan().all()
    assert torch.empty(1000, dtype=torch.uint8).eq(255).all()
    yield
    torch.use_deterministic_algorithms(before)
    torch.set_num_threads(threads)


def product(x: Tensor, packed: PackedWeight, bias: Tensor | None, few_rows: int = -1) -> Tensor:
    return backend.linear(x, backend.prepare(packed), bias, len(packed.values), few_rows)


@cache
def largest_case(dtype: torch.dtype, k: int, flushes: bool) -> tuple[Tensor, PackedWeight, Tensor, Expected, Expected]:
    """x, weight, bias, and what comes out without and with the bias; smaller cases are parts of these."""
    x, packed = normal(LARGEST, k, dtype=dtype, seed=1), random_weight(LARGEST, k, dtype, seed=k)
    bias = normal(LARGEST, dtype=dtype, seed=2)
    return x, packed, bias, expected(x, packed, None, flushes=flushes), expected(x, packed, bias, flushes=flushes)


def check_part(path: str, dtype: torch.dtype, few_rows: int, m: int, n: int, k: int) -> None:
    x, packed, bias, without, with_bias = largest_case(dtype, k, dot_flushes(path, dtype))
    part = PackedWeight(packed.values[:n], packed.mask[:n])
    stream = backend.prepare(part)
    given_bias, wanted = ((None, without), (bias[:n], with_bias))[(m + n // 6 + k // 8) % 2]
    y = backend.linear(x[:m], stream, given_bias, n, few_rows)
    assert not wanted[:m, :n].wrong(y).any(), f"{m} rows of x, weight [{n}, {k}], bias {given_bias is not None}"


@OF_EVERY_DTYPE
@KERNELS
class TestShapes:
    def test_every_number_of_rows_of_x(self, path: str, dtype: torch.dtype, few_rows: int) -> None:
        for m in (*range(81), 100, LARGEST):
            check_part(path, dtype, few_rows, m, 37, 40)

    def test_every_number_of_outputs(self, path: str, dtype: torch.dtype, few_rows: int) -> None:
        for n in range(1, LARGEST + 1, 3):  # with every remainder of the division by 16
            check_part(path, dtype, few_rows, (1, 2, 7, 18, 33, 66)[n % 6], n, 72)

    def test_every_number_of_inputs(self, path: str, dtype: torch.dtype, few_rows: int) -> None:
        for k in range(8, 201, 8):
            for m in (1, 19, 66):
                check_part(path, dtype, few_rows, m, 21, k)

    def test_more_outputs_than_a_chunk(self, path: str, dtype: torch.dtype, few_rows: int) -> None:
        """Blocks of rows are cut into chunks of at most 512, and columns of x are arranged 1024 at a time."""
        for m, n, k in ((3, 1111, 64), (17, 530, 8), (2, 18, 2088)):
            x, packed = normal(m, k, dtype=dtype), random_weight(n, k, dtype)
            wanted = expected(x, packed, None, flushes=dot_flushes(path, dtype))
            assert not wanted.wrong(product(x, packed, None, few_rows)).any(), (m, n, k)

    @pytest.mark.parametrize("batch", [(), (1,), (0,), (2, 3), (2, 0, 3), (1, 1, 9), (3, 1, 2, 4)], ids=str)
    def test_batches(self, path: str, dtype: torch.dtype, few_rows: int, batch: tuple[int, ...]) -> None:
        x, packed = normal(*batch, 40, dtype=dtype), random_weight(19, 40, dtype)
        y = product(x, packed, None, few_rows)
        assert y.shape == (*batch, 19)
        wanted = expected(x.reshape(-1, 40), packed, None, flushes=dot_flushes(path, dtype))
        assert not wanted.wrong(y.reshape(-1, 19)).any()

    def test_no_outputs(self, path: str, dtype: torch.dtype, few_rows: int) -> None:
        packed = random_weight(0, 16, dtype)
        assert product(normal(3, 16, dtype=dtype), packed, None, few_rows).shape == (3, 0)
        assert backend.restore(backend.prepare(packed)).shape == (0, 16)

    def test_views(self, path: str, dtype: torch.dtype, few_rows: int) -> None:
        wide, packed = normal(7, 2 * 40 + 1, dtype=dtype), random_weight(19, 40, dtype)
        biases = normal(19, 2, dtype=dtype)
        for x in (
            wide[:, 1::2],
            wide[:, 3:43],
            wide[:, :40].T.contiguous().T,
            wide[::3, :40],
            wide[:1, :40].expand(5, 40),
        ):
            assert torch.equal(product(x, packed, None, few_rows), product(x.clone(), packed, None, few_rows))
            assert not expected(x, packed, None, flushes=dot_flushes(path, dtype)).wrong(product(x, packed, None)).any()
        x = wide[:, :40].contiguous()
        bias = biases[:, 1]
        assert torch.equal(product(x, packed, bias, few_rows), product(x, packed, bias.clone(), few_rows))


@settings(
    max_examples=50,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    m=st.integers(0, 100), n=st.integers(1, 100), k=st.integers(1, 24), dtype=st.sampled_from(DTYPES),
    few_rows=st.sampled_from([-1, 0, MANY, 5]), with_bias=st.booleans(), threads=st.integers(1, 3),
    seed=st.integers(0, 1000),
    scale=st.sampled_from([1.0, 1e-3, 100.0]),
)  # fmt: skip
def test_fuzzed(
    path: str,
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    few_rows: int,
    with_bias: bool,
    threads: int,
    seed: int,
    scale: float,
) -> None:
    torch.set_num_threads(threads)
    x, packed = normal(m, 8 * k, dtype=dtype, seed=seed) * scale, random_weight(n, 8 * k, dtype, seed)
    bias = normal(n, dtype=dtype, seed=seed) if with_bias else None
    y = product(x, packed, bias, few_rows)
    assert not expected(x, packed, bias, flushes=dot_flushes(path, dtype)).wrong(y).any()


def scaled(name: str, dtype: torch.dtype, weight: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and inputs of a kind; factors are powers of two, so that numbers stay spread over the whole range."""
    narrow = dtype == torch.float16
    denormal, large, small = (2.0**-16, 2.0**12, 2.0**-8) if narrow else (2.0**-129, 2.0**60, 2.0**-68)
    match name:
        case "denormal weights":
            return weight * denormal, x * large
        case "denormal inputs":
            return weight * large, x * denormal
        case "denormal products":
            return weight * small, x * small
        case "large":
            return weight * large, x * (4 if narrow else large)
        case "zero weights":
            return torch.zeros_like(weight), x
        case "zero inputs":
            return weight, -torch.zeros_like(x)
        case "mixed inputs":
            factors = torch.tensor([0.0, denormal, 1.0, -1.0, 16.0, small]).to(dtype)
            return weight, x * factors[torch.arange(x.numel()).view_as(x) % 6]
        case _:
            raise AssertionError(name)


KINDS = (
    "denormal weights", "denormal inputs", "denormal products", "large", "zero weights", "zero inputs", "mixed inputs",
)  # fmt: skip


@OF_EVERY_DTYPE
@KERNELS
class TestValues:
    @pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: f"{pattern:04b}")
    def test_the_same_pattern_everywhere(self, path: str, dtype: torch.dtype, few_rows: int, pattern: int) -> None:
        mask = torch.full((35, 9), pattern | pattern << 4, dtype=torch.uint8)
        self.check(path, few_rows, normal(30, 72, dtype=dtype), PackedWeight(normal(35, 36, dtype=dtype), mask))

    def test_all_pairs_of_patterns(self, path: str, dtype: torch.dtype, few_rows: int) -> None:
        bytes_ = torch.tensor([low | high << 4 for low in PATTERNS for high in PATTERNS], dtype=torch.uint8)
        mask = torch.stack([bytes_.roll(shift) for shift in range(20)])
        self.check(path, few_rows, normal(9, 288, dtype=dtype), PackedWeight(normal(20, 144, dtype=dtype), mask))

    @pytest.mark.parametrize("kind", KINDS)
    def test_kinds(self, path: str, dtype: torch.dtype, few_rows: int, kind: str) -> None:
        weight, x = scaled(kind, dtype, normal(35, 36, dtype=dtype, seed=1), normal(23, 72, dtype=dtype, seed=2))
        self.check(path, few_rows, x, PackedWeight(weight, random_mask(35, 72)))

    def check(self, path: str, few_rows: int, x: Tensor, packed: PackedWeight) -> None:
        for rows in (1, 2, 3, 6, len(x)):
            for bias in (None, normal(len(packed.values), dtype=x.dtype)):
                wanted = expected(x[:rows], packed, bias, flushes=dot_flushes(path, x.dtype))
                y = product(x[:rows], packed, bias, few_rows)
                assert not wanted.wrong(y).any(), (rows, bias is not None)

    def test_special_inputs_appear_where_they_are_kept(self, path: str, dtype: torch.dtype, few_rows: int) -> None:
        """Infinity and NaN do not appear where their column is dropped (a dense product would make NaN of them)."""
        packed = random_weight(35, 72, dtype)
        for special in (torch.inf, -torch.inf, torch.nan):
            for column in (0, 5, 31, 32, 67, 71):
                x = normal(18, 72, dtype=dtype)
                x[3, column] = special
                y = product(x, packed, None, few_rows)
                assert not expected(x, packed, None, flushes=dot_flushes(path, dtype)).wrong(y).any()
                kept = (kept_columns(packed.mask) == column).any(-1)
                assert kept.any()
                assert torch.equal(y[3].isfinite(), ~kept)
                assert y[:3].isfinite().all()
                assert y[4:].isfinite().all()

    def test_infinity_times_a_kept_zero_is_nan(self, path: str, dtype: torch.dtype, few_rows: int) -> None:
        packed = PackedWeight(torch.zeros(17, 4, dtype=dtype), torch.full((17, 1), 0x33, dtype=torch.uint8))
        x = torch.zeros(2, 8, dtype=dtype)
        x[0, 1], x[1, 2] = torch.inf, torch.inf
        y = product(x, packed, None, few_rows)
        assert y[0].isnan().all()
        assert y[1].eq(0).all()

    def test_overflow_is_infinity(self, path: str, dtype: torch.dtype, few_rows: int) -> None:
        packed = random_weight(17, 16, dtype)
        large = torch.finfo(dtype).max
        packed.values.fill_(large)
        x = torch.full((3, 16), large, dtype=dtype)
        x[1] = -large
        y = product(x, packed, None, few_rows)
        assert y[[0, 2]].eq(torch.inf).all()
        assert y[1].eq(-torch.inf).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@KERNELS
@pytest.mark.parametrize("factor", [1.0, -1.5, 0.8203125, 1.0078125])
def test_all_16_bit_numbers(path: str, dtype: torch.dtype, few_rows: int, factor: float) -> None:
    """A single product of 16-bit numbers is exact, so the result is the rounded product to the bit."""
    x = torch.zeros(1 << 16, 8, dtype=dtype)
    x[:, 0] = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    packed = PackedWeight(torch.tensor([[factor, 0, 0, 0]], dtype=dtype), torch.tensor([[0x33]], dtype=torch.uint8))
    y = product(x, packed, None, few_rows)[:, 0]
    column = x[:, 0].double()
    if dot_flushes(path, dtype):
        column[column.abs() < 2.0**-126] = 0
    exact = (column * packed.values[0, 0].double()).float()
    if dot_flushes(path, dtype):
        exact[exact.abs() < 2.0**-126] = 0
    torch.testing.assert_close(y, exact.to(dtype), rtol=0, atol=0, equal_nan=True)


@OF_EVERY_DTYPE
@pytest.mark.parametrize("n", [1, 15, 16, 17, 100])
def test_prepare_restore_expand(path: str, dtype: torch.dtype, n: int) -> None:
    for k in (8, 24, 32, 40, 136):
        packed = random_weight(n, k, dtype, seed=n)
        packed.values[0, :3] = torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).tiny / 4, -1])
        stream = backend.prepare(packed)
        assert backend.describe(stream) == (dtype, n, k, False)
        back = backend.restore(stream)
        assert torch.equal(back.values.view(torch.uint8), packed.values.view(torch.uint8))
        assert torch.equal(back.mask, packed.mask)
        dense = unpack(packed)
        for first in {0, n // 2, n - 1, n}:
            for rows in {0, 1, n - first}:
                if first + rows <= n:
                    out = torch.empty(rows, k, dtype=dtype)
                    backend.expand(stream, first, rows, out)
                    assert torch.equal(out, dense[first : first + rows])


@OF_EVERY_DTYPE
def test_the_number_of_threads_changes_no_bit(path: str, dtype: torch.dtype) -> None:
    packed, bias, dense = random_weight(600, 136, dtype), normal(600, dtype=dtype), normal(600, 136, dtype=dtype)
    first: dict[tuple[str, int, int], Tensor] = {}
    for threads in (1, 2, 3, 5, 8):
        torch.set_num_threads(threads)
        stream = backend.prepare(packed)
        expanded = torch.empty(600, 136, dtype=dtype)
        backend.expand(stream, 0, 600, expanded)
        results = {
            ("expand", 0, 0): expanded,
            ("restore", 0, 0): backend.restore(stream).values,
        }
        for m in (1, 5, 23, 70, 130):
            x = normal(m, 136, dtype=dtype, seed=m)
            for few_rows in (0, MANY):
                results["linear", m, few_rows] = backend.linear(x, stream, bias, 600, few_rows)
            if path != "portable":
                results["dense", m, 0] = backend.dense_linear(x, dense, bias)
        for name, result in results.items():
            assert torch.equal(first.setdefault(name, result).view(torch.uint8), result.view(torch.uint8)), (
                name,
                threads,
            )


@OF_EVERY_DTYPE
def test_dense(path: str, dtype: torch.dtype) -> None:
    if path == "portable":
        with pytest.raises(RuntimeError, match="the code path portable has no kernel for dense weights"):
            backend.dense_linear(normal(1, 8, dtype=dtype), normal(2, 8, dtype=dtype), None)
        return
    for m, n, k in [
        *((m, 23, 40) for m in (0, 1, 2, 3, 4, 5, 8, 17)),
        *((m, n, 33) for n in range(1, 40) for m in (1, 5)),
        *((m, 9, k) for k in range(1, 70) for m in (1, 3)),
    ]:
        x, weight = normal(m, k, dtype=dtype, seed=m), normal(n, k + 3, dtype=dtype, seed=k)[:, 1 : k + 1]
        for bias in (None, normal(n, dtype=dtype)):
            y = backend.dense_linear(x, weight, bias)
            assert not expected_dense(x, weight, bias, flushes=dot_flushes(path, dtype)).wrong(y).any(), (m, n, k)
    x, weight = normal(2, 3, 40, dtype=dtype), normal(9, 40, dtype=dtype)
    assert torch.equal(
        backend.dense_linear(x, weight, None).view(6, 9), backend.dense_linear(x.view(6, 40), weight, None)
    )
    x[..., 0] = torch.inf
    assert not backend.dense_linear(x, weight, None).isfinite().any()


@OF_EVERY_DTYPE
@pytest.mark.parametrize("fault", ["a kept value at another column", "a dropped group", "values swapped"])
def test_the_bound_finds(path: str, dtype: torch.dtype, fault: str) -> None:
    """A weight with one group of every row wrong gives outputs that are far outside."""
    x, packed = normal(40, 512, dtype=dtype), random_weight(64, 512, dtype)
    wanted = expected(x, packed, None, flushes=dot_flushes(path, dtype))
    assert not wanted.wrong(product(x, packed, None)).any()
    values, mask = packed.values.clone(), packed.mask.clone()
    if fault == "a dropped group":
        values[:, 6:8] = 0
    elif fault == "values swapped":
        values[:, 6:8] = values[:, [7, 6]]
    else:  # the fourth group keeps two columns, of which one is now another
        moved = torch.zeros(16, dtype=torch.uint8)
        moved[torch.tensor(PATTERNS)] = torch.tensor([5, 3, 3, 3, 9, 9], dtype=torch.uint8)
        mask[:, 1] = mask[:, 1] & 15 | moved[(mask[:, 1] >> 4).int()] << 4
    y = product(x, PackedWeight(values, mask), None)
    assert wanted.wrong(y).float().mean() > 0.9
    assert wanted.error(y) > 40
