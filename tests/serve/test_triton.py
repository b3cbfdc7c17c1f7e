"""The Triton kernels without a GPU: Triton interprets them, against float64."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from compress.errors import CorruptCheckpointError
from compress.packed import PackedWeight, quantize_rows, unpack
from serve import support
from serve.kernels import choose, dispatch, narrow, ops, ways
from serve.kernels.cuda import layout as cuda_layout
from serve.kernels.triton import backend, layout, rounding
from serve.kernels.triton.backend import Kernels
from serve.linear import Sparse24Linear
from tests.interpreted import interpreted
from tests.serve.cpu_reference import expected, normal, random_weight
from tests.serve.gpu_reference import SCALED, expected_rounded, expected_scaled, products_of, same, scaled_weight

DTYPES = [torch.bfloat16, torch.float16]
of_8_bits = pytest.mark.parametrize("values", SCALED, ids=str)
CUDA = torch.device("cuda")


@pytest.fixture(scope="module")
def module() -> Iterator[types.ModuleType]:
    with interpreted("serve.kernels.triton.kernels") as found:
        yield found


@pytest.fixture
def fake(module: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> Kernels:
    """A torch that takes the processor for a GPU with these kernels."""
    kernels = Kernels(module, processors=4)
    monkeypatch.setattr(backend, "_kernels", lambda index, dtype: kernels)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    return kernels


def another_code(prepared: Tensor) -> Tensor:
    """The same with the code of another dtype in its header."""
    other = prepared.clone()
    other[4] = (other[4] + 1) % 4 + 1
    return other


def product(kernels: Kernels, x: Tensor, weight: PackedWeight, bias: Tensor | None, splits: int = 0) -> Tensor:
    y = torch.full((len(x), len(weight.values)), torch.nan, dtype=x.dtype)
    kernels.multiply(x, layout.prepare(weight), bias, y, number_of_splits=splits)
    return y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 7, 16, 17, 33, 64, 65, 130])
def test_products(module: types.ModuleType, dtype: torch.dtype, rows: int) -> None:
    """Every tile, with edges inside of tiles on all three axes."""
    n = 200
    for k, bias in ((328, normal(n, dtype=dtype)), (256, None)):  # in units of 8 columns, and of 128
        x, weight = normal(rows, k, dtype=dtype), random_weight(n, k, dtype)
        y = product(Kernels(module, 1), x, weight, bias)
        assert not expected(x, weight, bias, flushes=False).wrong(y).any()


@pytest.mark.parametrize("splits", [2, 4, 16])
@pytest.mark.parametrize("k", [8, 512, 1032])
def test_splits_of_the_sum(module: types.ModuleType, splits: int, k: int) -> None:
    """Also more of them than there are steps along K."""
    x, weight = normal(5, k, dtype=torch.bfloat16), random_weight(70, k, torch.bfloat16)
    bias = normal(70, dtype=torch.bfloat16)
    for added in (None, bias):
        y = product(Kernels(module, 1), x, weight, added, splits)
        assert not expected(x, weight, added, flushes=False).wrong(y).any()


def test_every_pair_of_columns(module: types.ModuleType) -> None:
    """All 36 valid mask bytes, values and inputs that tell the places apart: sums are exact."""
    pairs = [byte for byte in range(16) if byte.bit_count() == 2]
    mask = torch.tensor([[low | high << 4] for low in pairs for high in pairs], dtype=torch.uint8)
    values = torch.arange(1.0, 5.0).repeat(len(mask), 1).half()
    x = (2.0 ** torch.arange(8)).half().view(1, 8)
    weight = PackedWeight(values, mask)
    assert torch.equal(
        product(Kernels(module, 1), x, weight, None).double(), expected(x, weight, None, flushes=False).middle
    )


def test_what_is_not_finite_stays_in_its_row(module: types.ModuleType) -> None:
    x, weight = normal(3, 40, dtype=torch.bfloat16), random_weight(20, 40, torch.bfloat16)
    clean = product(Kernels(module, 1), x, weight, None)
    x[1, 7] = torch.inf
    y = product(Kernels(module, 1), x, weight, None)
    assert torch.equal(y[[0, 2]], clean[[0, 2]])
    assert not y[1].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), [(1, 8), (33, 264), (70, 384)])
def test_expansion(module: types.ModuleType, dtype: torch.dtype, n: int, k: int) -> None:
    weight, dense = random_weight(n, k, dtype), torch.full((n, k), torch.nan, dtype=dtype)
    Kernels(module, 1).expand(layout.prepare(weight), dense)
    assert torch.equal(dense, unpack(weight))


def test_a_weight_that_is_another_gives_nan(module: types.ModuleType) -> None:
    """Of the same length, so that only the header tells."""
    kernels, prepared = Kernels(module, 1), layout.prepare(random_weight(16, 32, torch.bfloat16))
    for x, n in ((normal(2, 32, dtype=torch.float16), 16), (normal(2, 16, dtype=torch.bfloat16), 32)):
        y, dense = torch.zeros(2, n, dtype=x.dtype), torch.zeros(n, x.shape[1], dtype=x.dtype)
        kernels.multiply(x, prepared, None, y)
        kernels.expand(prepared, dense)
        assert y.isnan().all()
        assert dense.isnan().all()


@of_8_bits
class TestScaled:
    """Values of 8 bits with a scale for each row."""

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("rows", [1, 16, 33, 64, 130])
    def test_products(self, module: types.ModuleType, values: torch.dtype, dtype: torch.dtype, rows: int) -> None:
        for k, bias in ((328, normal(200, dtype=dtype)), (256, None)):
            x, weight = normal(rows, k, dtype=dtype), scaled_weight(200, k, values)
            y = product(Kernels(module, 1), x, weight, bias)
            assert not expected_scaled(x, weight, bias).wrong(y).any()

    @pytest.mark.parametrize("splits", [2, 16])
    @pytest.mark.parametrize("k", [8, 512, 1032])
    def test_splits_of_the_sum(self, module: types.ModuleType, values: torch.dtype, splits: int, k: int) -> None:
        """The scale counts once, and the bias is not scaled."""
        x, weight = normal(5, k, dtype=torch.bfloat16), scaled_weight(70, k, values)
        for bias in (None, 100 * normal(70, dtype=torch.bfloat16)):
            y = product(Kernels(module, 1), x, weight, bias, splits)
            assert not expected_scaled(x, weight, bias).wrong(y).any()

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_every_value(self, module: types.ModuleType, values: torch.dtype, dtype: torch.dtype) -> None:
        """Exactly, subnormal ones too: each is alone in its sum, and its scale is 1."""
        bits = torch.arange(256, dtype=torch.uint8)
        every = bits[bits != 0x80] if values == torch.int8 else bits[(bits & 0x7F != 0x7F) & (bits != 0x80)]
        every = torch.cat([every, every[:2]])[: len(every) // 4 * 4].view(-1, 4).view(values)
        weight = PackedWeight(every, torch.full((len(every), 1), 0x33, dtype=torch.uint8), torch.ones(len(every), 1))
        x = torch.zeros(4, 8, dtype=dtype)
        x[[0, 1, 2, 3], [0, 1, 4, 5]] = 1
        y = product(Kernels(module, 1), x, weight, None)
        assert torch.equal(y.T.double(), every.double())
        assert len(every.unique() if values == torch.int8 else every.float().unique()) >= 248

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(("n", "k"), [(1, 8), (33, 264), (70, 384)])
    def test_expansion(self, module: types.ModuleType, values: torch.dtype, dtype: torch.dtype, n: int, k: int) -> None:
        """To the bit, with scales that make subnormal numbers of it."""
        weight, dense = scaled_weight(n, k, values), torch.full((n, k), torch.nan, dtype=dtype)
        assert weight.scale is not None
        weight.scale[::4] *= 2.0**-20 if dtype is torch.float16 else 2.0**-130
        Kernels(module, 1).expand(layout.prepare(weight), dense)
        exact = unpack(PackedWeight(weight.values.double() * weight.scale.double(), weight.mask))
        assert torch.equal(dense, unpack(weight, dtype))
        assert torch.equal(dense, exact.float().to(dtype))
        assert n == 1 or bool(((dense != 0) & (dense.abs() < torch.finfo(dtype).tiny)).any())

    def test_the_operator(self, fake: Kernels, values: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        """Few rows and many, by the kind that the length tells."""
        n, k = 50, 72
        weight, bias = scaled_weight(n, k, values), normal(n, dtype=torch.float16)
        prepared = backend.prepare(weight)
        asked: list[torch.dtype] = []
        monkeypatch.setattr(backend, "_kernels", lambda index, dtype: (asked.append(dtype), fake)[1])
        for shape in ((), (2, 3), (backend.MOST_ROWS + 1,)):
            x = normal(*shape, k, dtype=torch.float16)
            y = ops._sparse24_linear_cuda(x, prepared, bias, n)
            assert y.shape == (*shape, n)
            if len(y) > backend.MOST_ROWS:
                assert torch.equal(y, functional.linear(x, unpack(weight, torch.float16), bias))
            else:
                assert not expected_scaled(x.view(-1, k), weight, bias).wrong(y.view(-1, n)).any()
        assert set(asked) == {values}
        with pytest.raises(ValueError, match=r"x is torch\.float32"):
            backend.linear(normal(2, k, dtype=torch.float32), prepared, None, n)

    def test_another_kind_gives_nan(self, module: types.ModuleType, values: torch.dtype) -> None:
        prepared = layout.prepare(scaled_weight(16, 32, values))
        for damaged, is_nan in ((prepared, False), (another_code(prepared), True)):
            y, dense = torch.zeros(2, 16, dtype=torch.half), torch.zeros(16, 32, dtype=torch.half)
            Kernels(module, 4).multiply(normal(2, 32, dtype=torch.half), damaged, None, y)
            Kernels(module, 4).expand(damaged, dense)
            assert bool(y.isnan().all()) is bool(dense.isnan().all()) is is_nan

    @pytest.mark.parametrize("splits", [1, 2])
    @pytest.mark.parametrize("damage", ["a scale", "two scales", "two values", "a sign"])
    def test_mistakes_are_seen(self, module: types.ModuleType, values: torch.dtype, damage: str, splits: int) -> None:
        n, k = 70, 512
        x, weight = normal(5, k, dtype=torch.bfloat16), scaled_weight(n, k, values)
        prepared = layout.prepare(weight)
        own = layout.parts(prepared, n, k, torch.bfloat16)
        assert own.scale is not None
        if damage == "a scale":
            own.scale[17] *= 1.05
        elif damage == "two scales":
            own.scale[5:7] = own.scale[5:7].clone().flip(0)
        elif damage == "two values":
            largest = own.values.float().abs()[9].argmax()
            other = (largest + 1) % (k // 2)
            bits = own.values.view(torch.uint8)
            bits[9, largest], bits[9, other] = bits[9, other].clone(), bits[9, largest].clone()
        else:
            largest = own.values.float().abs()[9].argmax()
            own.values[9, largest] = (-own.values[9, largest].float()).to(values)
        y = torch.empty(5, n, dtype=torch.bfloat16)
        Kernels(module, 1).multiply(x, prepared, None, y, number_of_splits=splits)
        wrong = expected_scaled(x, weight, None).wrong(y)
        rows = {"a scale": [17], "two scales": [5, 6]}.get(damage, [9])
        assert wrong[:, rows].any(dim=0).all()
        assert int(wrong.any(dim=0).sum()) == len(rows)


@of_8_bits
class TestRoundedInputs:
    """x is rounded to values of 8 bits, too, with a scale for each row."""

    @staticmethod
    def product(
        module: types.ModuleType, x: Tensor, weight: PackedWeight, bias: Tensor | None, splits: int = 0
    ) -> Tensor:
        rounded, scale = quantize_rows(x, weight.values.dtype)
        y = torch.full((len(x), len(weight.values)), torch.nan, dtype=x.dtype)
        kernels, prepared, of_x = Kernels(module, 1), layout.prepare(weight), scale[:, 0].contiguous()
        kernels.multiply(rounded.to(x.dtype), prepared, bias, y, number_of_splits=splits, x_scales=of_x)
        return y

    @staticmethod
    def inputs(rows: int, k: int, dtype: torch.dtype) -> Tensor:
        """No two rows next to each other have scales that are alike."""
        return (normal(rows, k, dtype=torch.float32) * torch.exp2(torch.arange(rows) % 5 - 2.0)[:, None]).to(dtype)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(("rows", "splits"), [(1, 1), (16, 2), (33, 1), (64, 4), (130, 1), (130, 2)])
    def test_products(
        self, module: types.ModuleType, values: torch.dtype, dtype: torch.dtype, rows: int, splits: int
    ) -> None:
        """Each scale counts once, and the bias has none."""
        for k, bias in ((328, 100 * normal(200, dtype=dtype)), (256, None)):
            x, weight = self.inputs(rows, k, dtype), scaled_weight(200, k, values)
            y = self.product(module, x, weight, bias, splits)
            assert not expected_rounded(x, weight, bias).wrong(y).any()

    @pytest.mark.parametrize("splits", [1, 2])
    def test_scales_of_one_change_no_bit(self, module: types.ModuleType, values: torch.dtype, splits: int) -> None:
        x, prepared = normal(20, 328, dtype=torch.half), layout.prepare(scaled_weight(70, 328, values))
        bias, ones = normal(70, dtype=torch.half), torch.ones(20)
        with_ones, without = torch.zeros(20, 70, dtype=torch.half), torch.ones(20, 70, dtype=torch.half)
        Kernels(module, 1).multiply(x, prepared, bias, with_ones, number_of_splits=splits, x_scales=ones)
        Kernels(module, 1).multiply(x, prepared, bias, without, number_of_splits=splits)
        assert torch.equal(with_ones, without)

    @pytest.mark.parametrize("splits", [1, 2])
    def test_sums_that_float16_does_not_hold(self, module: types.ModuleType, values: torch.dtype, splits: int) -> None:
        """They are scaled in float32."""
        weight, x = scaled_weight(70, 1032, values), self.inputs(20, 1032, torch.half) / 64
        y, scale = self.product(module, x, weight, None, splits), quantize_rows(x, values)[1]
        assert weight.scale is not None
        assert y.isfinite().all()
        assert bool((y.double() / scale.double() / weight.scale.double().T).abs().max() > torch.finfo(torch.half).max)
        assert not expected_rounded(x, weight, None).wrong(y).any()

    @pytest.mark.parametrize("splits", [1, 2])
    @pytest.mark.parametrize("mistake", ["a scale", "two scales"])
    def test_mistakes_are_seen(self, module: types.ModuleType, values: torch.dtype, mistake: str, splits: int) -> None:
        x, weight = self.inputs(9, 512, torch.bfloat16), scaled_weight(70, 512, values)
        rounded, scale = quantize_rows(x, values)
        scales, y = scale[:, 0].clone(), torch.empty(9, 70, dtype=torch.bfloat16)
        if mistake == "a scale":
            scales[4] *= 1.05
        else:
            scales[4:6] = scales[4:6].clone().flip(0)
        how = {"number_of_splits": splits, "x_scales": scales}
        Kernels(module, 1).multiply(rounded.to(x.dtype), layout.prepare(weight), None, y, **how)
        wrong = expected_rounded(x, weight, None).wrong(y).any(dim=1)
        assert wrong.nonzero().flatten().tolist() == ([4] if mistake == "a scale" else [4, 5])

    @pytest.mark.parametrize("by_triton", [False, True])
    def test_the_operator(
        self, fake: Kernels, values: torch.dtype, by_triton: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Few rows and many, also where torch rounds them; a row that is not finite is NaN, and no other."""
        monkeypatch.setattr(rounding, "kernel_for", lambda device, values: fake.module if by_triton else None)
        n, k = 50, 72
        weight, bias = scaled_weight(n, k, values), normal(n, dtype=torch.float16)
        prepared = backend.prepare(dataclasses.replace(weight, quantizes_x=True))
        for shape in ((), (2, 3), (7,), (backend.MOST_ROWS + 1,)):
            x = normal(*shape, k, dtype=torch.float16)
            if x.ndim == 2:
                x[2, 5], x[4, 7] = torch.inf, torch.nan
            y = ops._sparse24_linear_cuda(x, prepared, bias, n, quantizes_x=True)
            assert y.shape == (*shape, n)
            if len(y) > backend.MOST_ROWS:
                wanted = functional.linear(products_of(x, values), unpack(weight, torch.float16), bias)
                assert torch.equal(y.isnan(), wanted.isnan())
                assert torch.equal(y.nan_to_num(), wanted.nan_to_num())
            else:
                assert not expected_rounded(x.view(-1, k), weight, bias).wrong(y.view(-1, n)).any()
            if x.ndim == 2:
                assert y.isnan().any(1).nonzero().flatten().tolist() == [2, 4]
                assert y.isnan().all(1).nonzero().flatten().tolist() == [2, 4]
        assert ops._sparse24_linear_cuda(x[:0], prepared, bias, n, quantizes_x=True).shape == (0, n)

    @pytest.mark.parametrize(("n", "k"), [(16, 16), (48, 1024), (208, 272)])
    def test_expansion_of_the_values_themselves(
        self, module: types.ModuleType, values: torch.dtype, n: int, k: int
    ) -> None:
        """To the bit, and the scales; by another header these are NaN."""
        weight = scaled_weight(n, k, values)
        assert weight.scale is not None
        prepared = layout.prepare(weight)
        dense, scales = Kernels(module, 1).expand_values(prepared, n, k, values)
        assert dense.dtype == values
        assert torch.equal(dense.view(torch.uint8), unpack(PackedWeight(weight.values.view(torch.uint8), weight.mask)))
        assert torch.equal(scales, weight.scale.flatten())
        prepared[4] += 1
        assert bool(Kernels(module, 1).expand_values(prepared, n, k, values)[1].isnan().all())

    def test_many_rows_of_bytes(self, fake: Kernels, values: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where the GPU multiplies values of 8 bits: as exact as few rows."""
        monkeypatch.setattr(narrow, "scale_on", lambda device, *of: narrow.find(torch.device("cpu"), *of))
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)
        n, k, rows = 48, 80, backend.MOST_ROWS + 1
        weight, bias = scaled_weight(n, k, values), normal(n, dtype=torch.float16)
        x = normal(rows, k, dtype=torch.float16)
        x[200, 5] = torch.nan
        prepared = backend.prepare(dataclasses.replace(weight, quantizes_x=True))
        for added in (None, bias):
            y = ops._sparse24_linear_cuda(x, prepared, added, n, quantizes_x=True)
            assert not expected_rounded(x, weight, added).wrong(y).any()
            assert y.isnan().any(1).nonzero().flatten().tolist() == [200]

        def refuse(x: Tensor, weight: Tensor) -> Tensor:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling cublasLtMatmul")

        monkeypatch.setattr(narrow, "multiply", refuse)
        monkeypatch.setattr(narrow, "_refused", set())
        y = ops._sparse24_linear_cuda(x, prepared, bias, n, quantizes_x=True)
        wanted = functional.linear(products_of(x, values), unpack(weight, torch.float16), bias)
        assert torch.equal(y.nan_to_num(7), wanted.nan_to_num(7))

    @pytest.mark.parametrize("in_bytes", [False, True])
    def test_many_rows_have_room_for_one_result(
        self, fake: Kernels, values: torch.dtype, in_bytes: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of a prompt it is large."""
        made: list[tuple[Any, torch.Size]] = []

        class Made(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
                result = func(*args, **(kwargs or {}))
                if func in (torch.ops.aten.new_empty.default, torch.ops.aten.mm.default):
                    made.append((func, result.shape))
                return result

        if in_bytes:
            monkeypatch.setattr(narrow, "scale_on", lambda device, *of: narrow.scale_by_torch)
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)
        rows, n, k = backend.MOST_ROWS + 1, 48, 80
        prepared = backend.prepare(dataclasses.replace(scaled_weight(n, k, values), quantizes_x=True))
        x = normal(rows, k, dtype=torch.float16)
        with Made():
            ops._sparse24_linear_cuda(x, prepared, None, n, quantizes_x=True)
        into = torch.ops.aten.new_empty.default if in_bytes else torch.ops.aten.mm.default
        assert [func for func, shape in made if shape == (rows, n)] == [into]

    def test_views(self, fake: Kernels, values: torch.dtype) -> None:
        weight, wide = scaled_weight(20, 40, values), normal(9 * 80 + 1, dtype=torch.bfloat16)
        for x in (wide[:-1].view(9, 80)[:, ::2], wide[1:361].view(9, 40)):
            y = backend.linear(x, backend.prepare(weight), None, 20, quantizes_x=True)
            assert not expected_rounded(x, weight, None).wrong(y).any()

    def test_it_is_proven_when_a_weight_is_prepared(self, values: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[torch.dtype] = []
        monkeypatch.setattr(rounding, "prove", lambda device, dtype: asked.append(dtype))
        monkeypatch.setattr(narrow, "prove", lambda device, dtype: asked.append(dtype))
        weight = scaled_weight(8, 16, values)
        backend.prepare(weight)
        assert asked == []
        backend.prepare(dataclasses.replace(weight, quantizes_x=True))
        assert asked == [values] * 2

    def test_a_weight_of_16_bits(self, fake: Kernels, values: torch.dtype) -> None:
        prepared = backend.prepare(random_weight(8, 16, torch.bfloat16))
        with pytest.raises(ValueError, match="of 8 bits, and these are not"):
            backend.linear(normal(2, 16, dtype=torch.bfloat16), prepared, None, 8, quantizes_x=True)


@pytest.mark.parametrize("rows", [1, 16, 17, 64, 65, 128, 4096])
@pytest.mark.parametrize(("n", "k"), [(8, 8), (576, 1536), (4096, 4096), (57344, 8192), (8192, 28672)])
def test_the_number_of_splits(rows: int, n: int, k: int) -> None:
    cut = backend.tiles(rows)
    found = backend.splits(cut, rows, n, k, 132)
    blocks = -(-n // cut.outputs) * -(-rows // cut.rows)
    assert found in (1, 2, 4, 8, 16)
    assert found == 1 or found * blocks <= 2 * 132
    assert found == 1 or -(-k // cut.depth) >= 4 * found
    if rows == 1 and (n, k) == (4096, 4096):
        assert found == 4  # a small weight would leave half of the processors idle


@pytest.mark.parametrize("rows", [16, 32, 64, 128])
def test_the_number_of_splits_that_was_measured(
    module: types.ModuleType, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each that does not cut the sum into more than there is, for its tile and its shape alone; more rows are blocks of several."""
    kernels, n, k, dtype = Kernels(module, 1), 200, 640, torch.bfloat16
    monkeypatch.setattr(backend, "_kernels", lambda index, values: kernels)
    names = backend.CHOICES.names(torch.device("cuda", 0), dtype, dtype, rows, n, k)
    steps = -(-k // backend.tiles(rows).depth)
    assert names == [f"{number} splits" for number in (1, 2, 4, 8, 16) if number <= steps]
    found, taken = ways.of("triton", None, dtype, dtype), []

    class Module:
        def __getattr__(self, name: str) -> Any:
            return Kernel() if name == "multiply" else getattr(module, name)

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            taken.append(grid[2])
            return module.multiply[grid]

    seen = Kernels(Module(), 1)  # pyright: ignore[reportArgumentType]
    x, weight = normal(rows, k, dtype=dtype), random_weight(n, k, dtype)
    found.take(rows, k, n, "2 splits")
    try:
        for name in [*names, "3 splits", None]:
            found.take(rows, n, k, name)
            y = product(seen, x, weight, None)
            assert not expected(x, weight, None, flushes=False).wrong(y).any()
        assert taken == [*(int(name.split()[0]) for name in names), 1, 1]
        found.take(128, n, k, "4 splits")
        assert seen._measured(normal(129, k, dtype=dtype), weight, n, backend.tiles(129)) == 0
    finally:
        ways.of.cache_clear()
    guessed = Kernels(module, 132)
    monkeypatch.setattr(backend, "_kernels", lambda index, values: guessed)
    cut = backend.splits(backend.tiles(rows), rows, n, 4096, 132)
    assert cut > 1
    names = backend.CHOICES.names(torch.device("cuda", 0), dtype, dtype, rows, n, 4096)
    assert names[0] == f"{cut} splits"
    assert len(names) == 5
    monkeypatch.setattr(backend, "_kernels", lambda index, values: "there is no Triton")
    assert backend.CHOICES.names(torch.device("cuda", 0), dtype, dtype, rows, n, k) == []


class TestOperator:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", [(), (1,), (2, 3), (70,)], ids=str)
    def test_shapes(self, fake: Kernels, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        x, weight, bias = normal(*shape, 72, dtype=dtype), random_weight(50, 72, dtype), normal(50, dtype=dtype)
        y = backend.linear(x, backend.prepare(weight), bias, 50)
        assert y.shape == (*shape, 50)
        assert not expected(x.view(-1, 72), weight, bias, flushes=False).wrong(y.view(-1, 50)).any()

    def test_nothing_to_multiply(self, fake: Kernels) -> None:
        empty, some = normal(0, 16, dtype=torch.bfloat16), normal(3, 16, dtype=torch.bfloat16)
        prepared = backend.prepare(random_weight(5, 16, torch.bfloat16))
        assert backend.linear(empty, prepared, None, 5).shape == (0, 5)
        none = backend.prepare(random_weight(0, 16, torch.bfloat16))
        assert backend.linear(some, none, None, 0).shape == (3, 0)

    def test_views(self, fake: Kernels) -> None:
        weight, wide = random_weight(20, 40, torch.bfloat16), normal(9, 80, dtype=torch.bfloat16)
        bias = normal(40, dtype=torch.bfloat16)[::2]
        y = backend.linear(wide[:, ::2], backend.prepare(weight), bias, 20)
        assert not expected(wide[:, ::2], weight, bias, flushes=False).wrong(y).any()

    def test_many_rows_are_multiplied_densely(self, fake: Kernels) -> None:
        rows, weight = backend.MOST_ROWS + 1, random_weight(5, 16, torch.bfloat16)
        x, bias = normal(rows, 16, dtype=torch.bfloat16), normal(5, dtype=torch.bfloat16)
        y = backend.linear(x, backend.prepare(weight), bias, 5)
        assert torch.equal(y, functional.linear(x, unpack(weight), bias))
        assert "expanded, then multiplied densely" in backend.reason(torch.bfloat16, rows)
        assert "in registers" in backend.reason(torch.bfloat16, rows - 1)

    def test_addresses_that_are_no_multiples_of_16(self, fake: Kernels) -> None:
        weight, wide = random_weight(20, 40, torch.bfloat16), normal(1 + 3 * 40, dtype=torch.bfloat16)
        x, bias = wide[1:].view(3, 40), normal(21, dtype=torch.bfloat16)[1:]
        assert x.data_ptr() % 16
        y = backend.linear(x, backend.prepare(weight), bias, 20)
        assert not expected(x, weight, bias, flushes=False).wrong(y).any()

    def test_one_operator_for_both_backends_of_gpus(self, fake: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
        """So that a graph that was compiled for one is right for the other; which one it is, the weight's length tells."""
        weight, x = random_weight(24, 72, torch.bfloat16), normal(3, 72, dtype=torch.bfloat16)
        monkeypatch.setattr(ops.cuda, "linear", lambda *given: "the other backend")
        for prepared, ours in ((layout.prepare(weight), True), (cuda_layout.prepare(weight), False)):
            y: Any = ops._sparse24_linear_cuda(x, prepared, None, 24)
            assert isinstance(y, Tensor) == ours

    @pytest.mark.parametrize("n", [0, 1, 7, 64, 65, 1000, 4096])
    @pytest.mark.parametrize("k", [8, 24, 64, 1032, 4096])
    def test_the_lengths_tell_them_apart(self, n: int, k: int) -> None:
        """Of both backends, and of values of 16 bits, int8 and float8; one with a second form behind it is longer than all."""
        kinds = (torch.bfloat16, *SCALED)
        lengths = [where.prepared_bytes(n, k, dtype) for where in (layout, cuda_layout) for dtype in kinds]
        assert len(set(lengths)) == 6
        if n:
            assert max(lengths) == cuda_layout.prepared_bytes(n, k, torch.bfloat16)
        for dtype, length in zip(kinds, lengths, strict=False):
            assert layout.values_dtype(length, n, k, torch.bfloat16) is dtype
        for length in (*lengths[3:], lengths[0] - 1, lengths[2] + 16):
            assert layout.values_dtype(length, n, k, torch.bfloat16) is None
        assert layout.values_dtype(lengths[0], n, k, torch.float32) is None

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"x": torch.zeros(2, 24, dtype=torch.bfloat16)}, r"no prepared weight \[5, 24\]"),
            ({"x": torch.zeros(2, 16)}, "x is torch.float32"),
            ({"n": 6}, r"no prepared weight \[6, 16\]"),
            ({"bias": torch.zeros(4, dtype=torch.bfloat16)}, "a bias of 5 numbers"),
            ({"bias": torch.zeros(5)}, "a bias of 5 numbers in torch.bfloat16"),
            ({"prepared": torch.zeros(7, dtype=torch.uint8)}, "no prepared weight"),
        ],
    )
    def test_what_does_not_go_together(self, fake: Kernels, change: dict[str, Any], said: str) -> None:
        weight = random_weight(5, 16, torch.bfloat16)
        right: dict[str, Any] = {
            "x": torch.zeros(2, 16, dtype=torch.bfloat16), "prepared": backend.prepare(weight), "bias": None, "n": 5,
        }  # fmt: skip
        with pytest.raises(ValueError, match=said):
            backend.linear(**(right | change))


class TestLayout:
    @pytest.mark.parametrize("dtype", [*DTYPES, *SCALED], ids=str)
    @pytest.mark.parametrize(("n", "k"), [(1, 8), (5, 24), (64, 136), (0, 8)])
    def test_there_and_back(self, dtype: torch.dtype, n: int, k: int) -> None:
        weight = scaled_weight(n, k, dtype) if dtype in SCALED else random_weight(n, k, dtype)
        prepared = layout.prepare(weight)
        assert len(prepared) == layout.prepared_bytes(n, k, dtype)
        assert 0 < len(prepared) - layout.HEADER_BYTES - weight.nbytes < 64
        parts = layout.parts(prepared, n, k, torch.bfloat16 if dtype in SCALED else dtype)
        assert all(part.data_ptr() % 16 == 0 for part in vars(parts).values() if n and isinstance(part, Tensor))
        restored = layout.restore(prepared)
        assert same(restored, weight)
        assert n == 0 or restored.values.data_ptr() != parts.values.data_ptr()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, *SCALED], ids=str)
    def test_damaged(self, dtype: torch.dtype) -> None:
        weight = scaled_weight(5, 24, dtype) if dtype in SCALED else random_weight(5, 24, dtype)
        prepared = layout.prepare(weight)
        for damaged in (
            prepared[:-1],
            prepared[:10],
            prepared.view(1, -1),
            prepared.clone().fill_(0),
            another_code(prepared),
            prepared.view(torch.int8),
        ):
            with pytest.raises(ValueError, match="damaged"):
                layout.restore(damaged)

    def test_a_mask_that_is_not_two_of_four(self) -> None:
        weight = random_weight(5, 24, torch.bfloat16)
        weight.mask[3, 1] ^= 1
        with pytest.raises(CorruptCheckpointError, match=r"layer\.q: .*row 3, columns 8 to 15"):
            layout.prepare(weight, "layer.q")


class TestChoice:
    def test_it_comes_after_the_sparse_tensor_cores(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("HALVE_BACKEND", raising=False)
        able = {name: None for name in support.KERNELS}
        for name in ("CUDA", "TRITON"):
            one = getattr(dispatch, name)
            replaced = dataclasses.replace(
                one, why_not=lambda device, dtype, name=one.name: able[name], reason=lambda d, r: "it"
            )
            monkeypatch.setattr(
                dispatch, "BACKENDS", tuple(replaced if b.name == one.name else b for b in dispatch.BACKENDS)
            )
        assert choose(CUDA, torch.bfloat16, 1, 8, 8).backend.name == "cuda"
        able["cuda"] = "NVRTC is missing"
        fallen = choose(CUDA, torch.bfloat16, 1, 8, 8)
        assert fallen.backend.name == "triton"
        assert "not cuda: NVRTC is missing" in fallen.reason
        able["triton"] = "no Triton"
        assert choose(CUDA, torch.bfloat16, 1, 8, 8).backend.name == "plain"

    def test_a_layer_runs_on_it(self, fake: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
        """Prepared, run, and given back, as `serve.linear` does."""
        here = dataclasses.replace(dispatch.TRITON, why_not=lambda device, dtype: None)
        monkeypatch.setattr(ops, "sparse24_linear", backend.linear)
        monkeypatch.delenv("HALVE_BACKEND", raising=False)
        monkeypatch.setattr(dispatch, "BACKENDS", (here, *dispatch.BACKENDS))
        weight, x = random_weight(24, 40, torch.bfloat16), normal(3, 40, dtype=torch.bfloat16)
        layer = Sparse24Linear(40, 24, bias=False, dtype=torch.bfloat16, device="cpu")
        layer.load_state_dict({"weight_packed": weight.values, "weight_mask": weight.mask})
        layer.prepare()
        assert layer.weight_prepared is not None
        assert layer.weight_packed.numel() == 0
        assert not expected(x, weight, None, flushes=False).wrong(layer(x)).any()
        state = layer.state_dict()
        assert torch.equal(state["weight_packed"], weight.values)
        assert torch.equal(state["weight_mask"], weight.mask)

    @of_8_bits
    def test_a_layer_of_8_bits_runs_on_it(
        self, fake: Kernels, values: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        here = dataclasses.replace(dispatch.TRITON, why_not=lambda device, dtype: None)
        monkeypatch.setattr(ops, "sparse24_linear", backend.linear)
        monkeypatch.delenv("HALVE_BACKEND", raising=False)
        monkeypatch.setattr(dispatch, "BACKENDS", (here, *dispatch.BACKENDS))
        weight, x = scaled_weight(24, 40, values), normal(3, 40, dtype=torch.bfloat16)
        layer = Sparse24Linear(40, 24, bias=False, dtype=torch.bfloat16, value_dtype=values, device="cpu")
        assert weight.scale is not None
        layer.load_state_dict(
            {"weight_packed": weight.values, "weight_mask": weight.mask, "weight_scale": weight.scale}
        )
        layer.prepare()
        assert layer.prepared_for == "triton"
        assert not expected_scaled(x, weight, None).wrong(layer(x)).any()
        assert same(layer.packed, weight)

    @pytest.mark.parametrize(("device", "dtype", "said"), [
        ("cpu", torch.int8, "the weight is on cpu"),
        ("cuda", torch.float8_e4m3fn, "torch finds no GPU"),
        ("cpu", torch.bfloat16, "the weight is on cpu"),
        ("cuda", torch.float32, "values are float32"),
        ("cuda", torch.bfloat16, "torch finds no GPU"),
    ])  # fmt: skip
    def test_why_not(self, device: str, dtype: torch.dtype, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert said in str(backend.why_not(torch.device(device), dtype))

    @pytest.fixture
    def a_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        properties = types.SimpleNamespace(multi_processor_count=4, major=9, minor=0)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
        monkeypatch.setattr(torch.cuda, "device", lambda index: torch.device("cpu"))  # a context that does nothing here
        backend._kernels.cache_clear()

    def test_without_triton(self, a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
        def missing(name: str) -> types.ModuleType:
            raise ImportError("No module named 'triton'")

        monkeypatch.setattr(backend.importlib, "import_module", missing)
        assert str(backend.why_not(CUDA, torch.bfloat16)).endswith("ImportError: No module named 'triton'")
        backend._kernels.cache_clear()

    @pytest.mark.parametrize(
        ("amd", "name", "capability", "said"),
        [
            (None, "", (7, 5), "has compute capability 7.5, and bfloat16 tensor cores came with 8.0"),
            (None, "", (8, 0), None),
            ("6.4", "gfx942:sramecc+:xnack-", (9, 4), None),
            ("6.4", "gfx1030", (10, 3), "the GPU is gfx1030, and matrix units are known of gfx90a"),
        ],
    )
    def test_gpus_without_matrix_units(
        self,
        a_gpu: None,
        monkeypatch: pytest.MonkeyPatch,
        amd: str | None,
        name: str,
        capability: tuple[int, int],
        said: str | None,
    ) -> None:
        major, minor = capability
        properties = types.SimpleNamespace(multi_processor_count=4, major=major, minor=minor, gcnArchName=name)
        monkeypatch.setattr(torch.version, "hip", amd)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
        monkeypatch.setattr(backend, "wrong", lambda *given: None)
        refusal = backend.why_not(CUDA, torch.bfloat16)
        assert refusal is None if said is None else said in str(refusal)
        backend._kernels.cache_clear()

    def test_a_compiler_that_fails(self, a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(*arguments: object) -> None:
            raise RuntimeError("PTX was compiled for another GPU\nand a stack of lines")

        monkeypatch.setattr(backend, "wrong", broken)
        assert backend.why_not(CUDA, torch.float16) == (
            "Triton's kernels do not run here: RuntimeError: PTX was compiled for another GPU"
        )
        backend._kernels.cache_clear()


class TestProof:
    """The kernels prove themselves before they are used."""

    def test_right_ones_pass(self, module: types.ModuleType) -> None:
        for dtype in (*DTYPES, *SCALED):
            assert backend.wrong(Kernels(module, 4), torch.device("cpu"), dtype) is None

    @pytest.mark.parametrize("dtype", [torch.bfloat16, *SCALED], ids=str)
    @pytest.mark.parametrize("rows", [16, 128])
    def test_a_wrong_one_is_found(self, module: types.ModuleType, rows: int, dtype: torch.dtype) -> None:
        @dataclasses.dataclass(frozen=True)
        class Wrong(Kernels):
            def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, **more: Any) -> None:
                super().multiply(x, weight, bias, y, **more)
                if len(x) == rows:
                    y[rows // 2, 3] += 0.05 * y[rows // 2].abs().max()

        assert f"for {rows} rows of x computes wrongly" in str(
            backend.wrong(Wrong(module, 4), torch.device("cpu"), dtype)
        )

    @pytest.mark.parametrize(
        ("values", "damage", "said"),
        [
            *((values, damage, "for 16 rows of x") for values in SCALED for damage in ("scales", "sums")),
            *(
                (values, damage, "for 16 rows of x with scales")
                for values in SCALED
                for damage in ("x scales", "x sums")
            ),
            (torch.float8_e4m3fn, "subnormal", "for 16 rows of x"),
            *((values, "dense", "expands weights") for values in SCALED),
        ],
    )
    def test_what_only_8_bits_have(self, module: types.ModuleType, values: torch.dtype, damage: str, said: str) -> None:
        """The scale of another row, of the weight and of x, one that counts for each split, small values of float8 that are lost, and a dense
        value off by one."""

        @dataclasses.dataclass(frozen=True)
        class Wrong(Kernels):
            def multiply(self, x: Tensor, prepared: Tensor, bias: Tensor | None, y: Tensor, **more: Any) -> None:
                prepared = prepared.clone()
                own = layout.parts(prepared, y.shape[1], x.shape[1], x.dtype)
                assert own.scale is not None
                if damage == "scales":
                    own.scale.copy_(own.scale.roll(1, 0))
                elif damage == "sums" and more["number_of_splits"] == 2:
                    own.scale.mul_(own.scale)
                elif damage == "x scales" and more["x_scales"] is not None:
                    more["x_scales"] = more["x_scales"].roll(1)
                elif damage == "x sums" and more["x_scales"] is not None and more["number_of_splits"] == 2:
                    more["x_scales"] = None
                elif damage == "subnormal":
                    own.values.view(torch.uint8)[own.values.float().abs() < 2**-6] = 0
                super().multiply(x, prepared, bias, y, **more)

            def expand(self, prepared: Tensor, dense: Tensor) -> None:
                super().expand(prepared, dense)
                if damage == "dense":
                    last = dense.view(torch.int16)[-1]
                    last[last.nonzero()[0]] ^= 1

        assert said in str(backend.wrong(Wrong(module, 4), torch.device("cpu"), values))
