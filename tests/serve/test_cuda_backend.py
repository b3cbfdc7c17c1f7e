"""The backend for GPUs without one: a driver that runs the kernels on the processor stands for the real one.

So everything between `sparse24_linear` and the kernels is real: the arguments, the launch with its clusters and shared memory,
and what is said where something is missing. Structures of the driver are written down in C++ from ``cuda.h``.
"""

from __future__ import annotations

import ctypes
import dataclasses
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from compress.packed import unpack
from serve.kernels import choose, dispatch, narrow, ways
from serve.kernels.cpu import build
from serve.kernels.cuda import backend, beside, compiler, driver, layout, plan
from serve.kernels.cuda.compiler import CompilerError
from serve.kernels.cuda.driver import Driver, DriverError
from serve.kernels.cuda.plan import Device, Form
from tests.serve.cpu_reference import expected, normal, random_weight
from tests.serve.cuda_emulation import DTYPES, Emulator, compile_emulator, needs_compiler
from tests.serve.gpu_reference import SCALED, expected_rounded, expected_scaled, products_of, same, scaled_weight

HOPPER, AMPERE = (9, 0), (8, 0)
CUDA = torch.device("cuda")
FORMS = tuple(form for form in plan.forms(HOPPER) if form.groups in (1, 2))
"""One or two for each number of tiles."""


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    return compile_emulator(tmp_path_factory.mktemp("driver"), HOPPER, forms=FORMS)


@pytest.fixture
def fake(emulator: Emulator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Emulator]:
    """A driver, a compiler that makes what it takes for code, and a torch that takes the processor for a device."""
    monkeypatch.setenv("HALVE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compiler, "version", lambda: (13, 0))
    monkeypatch.setattr(compiler, "architecture", lambda capability: 90)

    def compile_cubin(text: str, arch: int) -> tuple[bytes, str]:
        return (b"Float16" if ", Float16, " in text else b"BFloat16"), ""

    monkeypatch.setattr(compiler, "compile_cubin", compile_cubin)
    kernels = {dtype: load(emulator, dtype) for dtype in DTYPES}
    monkeypatch.setattr(backend, "_kernels", lambda index, dtype: kernels[dtype])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0x5EED, raising=False)
    yield emulator
    number(emulator, "largest_cluster").value = 8


def load(emulator: Emulator, dtype: torch.dtype, capability: tuple[int, int] = HOPPER) -> backend.Kernels:
    return backend.load(
        Device(capability, 132), dtype, Driver(str(emulator.path)), emulator.forms, values=emulator.values
    )


@pytest.fixture(scope="module", params=SCALED, ids=str)
def scaled_emulator(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    forms = [form for form in plan.forms(HOPPER, layout.SCALED_UNIT_BYTES) if form.groups in (1, 2)]
    return compile_emulator(tmp_path_factory.mktemp("scaled"), HOPPER, forms=forms, values=request.param)


@pytest.fixture
def scaled(scaled_emulator: Emulator, fake: Emulator, monkeypatch: pytest.MonkeyPatch) -> Emulator:
    """The same for values of 8 bits, and for no others."""
    kernels = {(dtype, scaled_emulator.values): load(scaled_emulator, dtype) for dtype in DTYPES}
    monkeypatch.setattr(backend, "_kernels", lambda index, dtype, values=None: kernels[dtype, values])
    return scaled_emulator


def number(emulator: Emulator, name: str) -> ctypes.c_int:
    """A variable of the driver."""
    return ctypes.c_int.in_dll(emulator.library, f"emulated_{name}")


@needs_compiler
class TestProducts:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", [(), (1,), (9,), (2, 3), (4, 1, 5), (40,), (64,), (65,), (2, 65)], ids=str)
    def test_few_rows(self, fake: Emulator, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        n, k = 70, 264
        x, weight, bias = normal(*shape, k, dtype=dtype), random_weight(n, k, dtype), normal(n, dtype=dtype)
        prepared = layout.prepare(weight)
        for added in (None, bias):
            y = backend.linear(x, prepared, added, n)
            assert y.shape == (*shape, n)
            assert not expected(x.view(-1, k), weight, added, flushes=False).wrong(y.view(-1, n)).any()

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_many_rows_are_multiplied_densely(self, fake: Emulator, dtype: torch.dtype) -> None:
        x, weight, bias = normal(257, 72, dtype=dtype), random_weight(70, 72, dtype), normal(70, dtype=dtype)
        y = backend.linear(x, layout.prepare(weight), bias, 70)
        assert torch.equal(y, functional.linear(x, unpack(weight), bias))
        assert "expanded, then multiplied densely" in backend.reason(dtype, 257)
        assert "once for each 64 rows" in backend.reason(dtype, 256)
        assert "read once past 64 rows" in backend.reason(dtype, 64)

    @pytest.mark.parametrize("rows", [64, 65, 128, 256])
    def test_more_rows_are_parts_of_the_same_bits(self, fake: Emulator, rows: int) -> None:
        """Each part is what it would be alone, by as few launches as there are parts."""
        x, weight = normal(rows, 72, dtype=torch.bfloat16), random_weight(70, 72, torch.bfloat16)
        prepared, before = layout.prepare(weight), number(fake, "launches").value
        y = backend.linear(x, prepared, None, 70)
        assert number(fake, "launches").value - before == -(-rows // 64)
        alone = torch.cat([backend.linear(part, prepared, None, 70) for part in x.split(64)])
        assert torch.equal(y, alone)

    def test_nothing_to_multiply(self, fake: Emulator) -> None:
        before = number(fake, "launches").value
        assert backend.linear(normal(0, 16, dtype=torch.bfloat16), layout.prepare(random_weight(5, 16, torch.bfloat16)),
                              None, 5).shape == (0, 5)  # fmt: skip
        assert backend.linear(normal(3, 16, dtype=torch.bfloat16), layout.prepare(random_weight(0, 16, torch.bfloat16)),
                              None, 0).shape == (3, 0)  # fmt: skip
        assert number(fake, "launches").value == before

    def test_views(self, fake: Emulator) -> None:
        """Strides, and an address that copies of 16 bytes cannot begin at."""
        weight = random_weight(20, 40, torch.bfloat16)
        prepared, wide = layout.prepare(weight), normal(9 * 41 * 2, dtype=torch.bfloat16)
        strided, odd = wide[: 9 * 80].view(9, 80)[:, ::2], wide[1 : 1 + 9 * 40].view(9, 40)
        assert odd.data_ptr() % 16
        for x in (strided, odd):
            y = backend.linear(x, prepared, normal(40, dtype=torch.bfloat16)[::2], 20)
            assert not expected(x, weight, normal(40, dtype=torch.bfloat16)[::2], flushes=False).wrong(y).any()

    def test_it_is_on_the_stream_of_torch(self, fake: Emulator) -> None:
        backend.linear(
            normal(1, 16, dtype=torch.bfloat16), layout.prepare(random_weight(5, 16, torch.bfloat16)), None, 5
        )
        assert ctypes.c_void_p.in_dll(fake.library, "emulated_last_stream").value == 0x5EED

    @pytest.mark.parametrize("splits", [1, 2, 4])
    def test_splits_and_overlap(self, fake: Emulator, splits: int) -> None:
        kernels, weight = load(fake, torch.bfloat16), random_weight(70, 520, torch.bfloat16)
        x, y = normal(5, 520, dtype=torch.bfloat16), torch.empty(5, 70, dtype=torch.bfloat16)
        form = plan.for_rows(kernels.active, 5)[0]
        for overlap in (False, True):
            y.fill_(float("nan"))
            kernels.multiply(x, layout.prepare(weight), None, y, 0, form=form, splits=splits, overlap=overlap)
            assert not expected(x, weight, None, flushes=False).wrong(y).any()
            assert number(fake, "last_overlap").value == overlap

    @pytest.mark.parametrize("rows", [1, 8, 9, 30, 64, 70])
    def test_the_way_that_was_measured(self, fake: Emulator, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Is taken, each of them, from the next product on; for its rows and its shape alone, and as long as it is there."""
        n, k = 70, 520
        kernels = load(fake, torch.bfloat16)
        monkeypatch.setattr(backend, "_kernels", lambda index, dtype: kernels)
        class_of = min(count for count in backend.CHOICES.rows if min(rows, 64) <= count)
        names = backend.CHOICES.names(torch.device("cuda", 0), torch.bfloat16, torch.bfloat16, class_of, n, k)
        forms = plan.for_rows(kernels.active, class_of)
        assert sorted(names) == sorted(plan.way_name(form, cut) for form in forms for cut in kernels.active[form])
        x, weight = normal(rows, k, dtype=torch.bfloat16), random_weight(n, k, torch.bfloat16)
        prepared = layout.prepare(weight)
        launched: list[str] = []
        by_function = {function: name for name, function in kernels.functions.items()}
        launch = kernels.driver.launch

        def seen(function: int, how: driver.Config, stream: int, arguments: backend.Arguments) -> None:
            launched.append(f"{by_function[function]} in {arguments.splits}")
            launch(function, how, stream, arguments)

        monkeypatch.setattr(kernels.driver, "launch", seen)

        def way() -> str:
            launched.clear()
            y = backend.linear(x, prepared, None, n)
            assert not expected(x, weight, None, flushes=False).wrong(y).any()
            return launched[0]

        assert way() == names[0]
        for name in reversed(names):
            kernels.measured.take(class_of, n, k, name)
            assert way() == name
        assert names[0] != names[-1]
        kernels.measured.take(class_of, n, k, names[-1])
        for other in backend.CHOICES.rows:
            if other != class_of:
                kernels.measured.take(other, n, k, "another kernel")
        kernels.measured.take(class_of, k, n, names[0])
        assert way() == names[-1]
        kernels.measured.take(class_of, n, k, "of another version in 3")
        assert way() == names[0]
        kernels.measured.take(class_of, n, k, names[-1])
        kernels.measured.take(class_of, n, k, None)
        assert way() == names[0]

    def test_a_sum_is_not_cut_into_more_than_there_is(self, fake: Emulator) -> None:
        names = backend.CHOICES.names(torch.device("cuda", 0), torch.bfloat16, torch.bfloat16, 8, 640, 128)
        assert {name.rpartition(" ")[2] for name in names} == {"1", "2"}

    def test_what_does_not_belong_together(self, fake: Emulator) -> None:
        x, prepared = normal(3, 40, dtype=torch.bfloat16), layout.prepare(random_weight(70, 40, torch.bfloat16))
        for bad in (x.float(), x[:, :36], x.to("meta"), x[0, 0]):
            with pytest.raises(ValueError, match="x is torch"):
                backend.linear(bad, prepared, None, 70)
        for bad, n in ((prepared[:-1], 70), (prepared, 140), (prepared.to(torch.int16), 70)):
            with pytest.raises(ValueError, match=rf"is no prepared weight \[{n}, 40\]"):
                backend.linear(x, bad, None, n)
        for bias in (
            normal(69, dtype=torch.bfloat16),
            normal(70, dtype=torch.float16),
            normal(1, 70, dtype=torch.bfloat16),
        ):
            with pytest.raises(ValueError, match=r"a bias of 70 numbers in torch.bfloat16 on cpu is needed"):
                backend.linear(x, prepared, bias, 70)

    def test_x_is_not_rounded_for_values_of_16_bits(self, fake: Emulator) -> None:
        prepared = layout.prepare(random_weight(70, 40, torch.bfloat16))
        with pytest.raises(ValueError, match="of 8 bits, and these are not"):
            backend.linear(normal(3, 40, dtype=torch.bfloat16), prepared, None, 70, quantizes_x=True)

    def test_a_launch_that_fails(self, fake: Emulator) -> None:
        weight = layout.prepare(random_weight(70, 40, torch.bfloat16))
        weight[layout.HEADER_BYTES + 4096 : layout.HEADER_BYTES + 4608] = 0  # metadata that are undefined
        with pytest.raises(RuntimeError, match="the driver could not launch a kernel: CUDA_ERROR_LAUNCH_FAILED"):
            backend.linear(normal(1, 40, dtype=torch.bfloat16), weight, None, 70)

    def test_no_kernels(self, fake: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(backend, "_kernels", lambda index, dtype: "NVRTC is not there")
        assert backend.CHOICES.names(torch.device("cuda", 0), torch.bfloat16, torch.bfloat16, 8, 64, 64) == []
        with pytest.raises(RuntimeError, match="NVRTC is not there"):
            backend.linear(
                normal(1, 8, dtype=torch.bfloat16), layout.prepare(random_weight(5, 8, torch.bfloat16)), None, 5
            )


@needs_compiler
class TestScaled:
    """Values of 8 bits, by x in either dtype; which they are, the length of the weight tells."""

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", [(), (1,), (2, 3), (40,), (2, 65), (257,)], ids=str)
    def test_products(self, scaled: Emulator, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        n, k = 70, 264
        assert scaled.values is not None
        x, weight, bias = normal(*shape, k, dtype=dtype), scaled_weight(n, k, scaled.values), normal(n, dtype=dtype)
        prepared = layout.prepare(weight)
        for added in (None, bias):
            y = backend.linear(x, prepared, added, n)
            assert y.shape == (*shape, n)
            if x.numel() > plan.MOST_PASSES * plan.MOST_ROWS * k:
                assert torch.equal(y, functional.linear(x, unpack(weight, dtype), added))
            else:
                assert not expected_scaled(x.view(-1, k), weight, added).wrong(y.view(-1, n)).any()
        assert same(backend.restore(prepared), weight)

    def test_nothing_to_multiply(self, scaled: Emulator) -> None:
        assert scaled.values is not None
        before = number(scaled, "launches").value
        for m, n in ((0, 5), (3, 0)):
            prepared = layout.prepare(scaled_weight(n, 16, scaled.values))
            for rows in (m, 300 * m):
                assert backend.linear(normal(rows, 16, dtype=torch.half), prepared, None, n).shape == (rows, n)
        assert number(scaled, "launches").value == before

    def test_what_does_not_belong_together(self, scaled: Emulator) -> None:
        assert scaled.values is not None
        prepared = layout.prepare(scaled_weight(70, 40, scaled.values))
        with pytest.raises(ValueError, match=r"x is torch\.float32"):
            backend.linear(normal(3, 40, dtype=torch.float32), prepared, None, 70)
        for bad, n in ((prepared[:-1], 70), (prepared[:-256], 70), (prepared, 140)):
            with pytest.raises(ValueError, match=rf"is no prepared weight \[{n}, 40\]"):
                backend.linear(normal(3, 40, dtype=torch.bfloat16), bad, None, n)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", [(), (1,), (2, 3), (40,), (2, 65), (257,)], ids=str)
    def test_x_is_rounded(self, scaled: Emulator, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        """A row that is not finite is NaN, and no other; of many rows, what is multiplied are products of values and scales."""
        n, k = 70, 264
        assert scaled.values is not None
        x, weight, bias = normal(*shape, k, dtype=dtype), scaled_weight(n, k, scaled.values), normal(n, dtype=dtype)
        rows = x.view(-1, k)
        rows *= torch.exp2(torch.arange(len(rows)) % 5 - 2.0)[:, None].to(dtype)
        if len(rows) > 5:
            rows[2, 5], rows[4, 7] = torch.inf, torch.nan
        prepared, before = layout.prepare(weight), number(scaled, "launches").value
        for added in (None, bias):
            y = backend.linear(x, prepared, added, n, quantizes_x=True)
            assert y.shape == (*shape, n)
            y = y.view(-1, n)
            if len(rows) > plan.MOST_PASSES * plan.MOST_ROWS:
                wanted = functional.linear(products_of(rows, scaled.values), unpack(weight, dtype), added)
                assert torch.equal(y.isnan(), wanted.isnan())
                assert torch.equal(y.nan_to_num(), wanted.nan_to_num())
            else:
                assert not expected_rounded(rows, weight, added).wrong(y).any()
            bad = [2, 4] if len(rows) > 5 else []
            assert y.isnan().any(1).nonzero().flatten().tolist() == y.isnan().all(1).nonzero().flatten().tolist() == bad
        of_one = 1 if len(rows) > plan.MOST_PASSES * plan.MOST_ROWS else -(-len(rows) // plan.MOST_ROWS)
        assert number(scaled, "launches").value - before == 2 * of_one

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", [(257,), (2, 129)], ids=str)
    def test_many_rows_of_bytes(
        self, scaled: Emulator, dtype: torch.dtype, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where the GPU multiplies values of 8 bits: as exact as few rows, by one launch of the driver."""
        monkeypatch.setattr(narrow, "scale_on", lambda device, *of: narrow.find(torch.device("cpu"), *of))
        n, k = 80, 272
        assert scaled.values is not None
        x, weight, bias = normal(*shape, k, dtype=dtype), scaled_weight(n, k, scaled.values), normal(n, dtype=dtype)
        x.view(-1, k)[200, 5] = torch.inf
        prepared, before = layout.prepare(weight), number(scaled, "launches").value
        for added in (None, bias):
            y = backend.linear(x, prepared, added, n, quantizes_x=True)
            assert y.shape == (*shape, n)
            y = y.view(-1, n)
            assert not expected_rounded(x.view(-1, k), weight, added).wrong(y).any()
            assert y.isnan().any(1).nonzero().flatten().tolist() == [200]
        assert number(scaled, "launches").value - before == 2
        other = prepared.clone()
        other[8] ^= 16  # N, as the header has it
        assert bool(backend.linear(x, other, bias, n, quantizes_x=True).isnan().all())

    def test_a_bias_that_is_part_of_another(self, scaled: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
        """For one that begins between multiples of 16 bytes Triton would compile another kernel in the product."""
        assert scaled.values is not None
        given: list[Tensor | None] = []

        def scale(sums: Tensor, x_scales: Tensor, scales: Tensor, bias: Tensor | None, y: Tensor) -> None:
            given.extend([x_scales, scales, bias, y])
            narrow.scale_by_torch(sums, x_scales, scales, bias, y)

        monkeypatch.setattr(narrow, "scale_on", lambda *of: scale)
        x, weight = normal(257, 80, dtype=torch.bfloat16), scaled_weight(32, 80, scaled.values)
        bias = normal(33, dtype=torch.bfloat16)[1:]
        y = backend.linear(x, layout.prepare(weight), bias, 32, quantizes_x=True)
        assert not expected_rounded(x, weight, bias).wrong(y).any()
        assert [tensor is not None and tensor.data_ptr() % 16 for tensor in given] == [0] * 4

    @pytest.mark.parametrize(("n", "k"), [(72, 272), (80, 264)])
    def test_shapes_that_are_not_multiplied_as_bytes(
        self, scaled: Emulator, n: int, k: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(narrow, "scale_on", lambda device, *of: narrow.find(torch.device("cpu"), *of))
        assert scaled.values is not None
        x, weight = normal(257, k, dtype=torch.bfloat16), scaled_weight(n, k, scaled.values)
        y = backend.linear(x, layout.prepare(weight), None, n, quantizes_x=True)
        assert torch.equal(y, functional.linear(products_of(x, scaled.values), unpack(weight, torch.bfloat16)))

    def test_a_shape_that_torch_refuses_is_multiplied_as_numbers(
        self, scaled: Emulator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(x: Tensor, weight: Tensor) -> Tensor:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling cublasLtMatmul")

        monkeypatch.setattr(narrow, "scale_on", lambda *of: narrow.scale_by_torch)
        monkeypatch.setattr(narrow, "multiply", refuse)
        monkeypatch.setattr(narrow, "_refused", set())
        assert scaled.values is not None
        x, weight = normal(257, 80, dtype=torch.bfloat16), scaled_weight(32, 80, scaled.values)
        wanted = functional.linear(products_of(x, scaled.values), unpack(weight, torch.bfloat16))
        prepared, before = layout.prepare(weight), number(scaled, "launches").value
        for launches in (2, 1):  # the first time both ways
            assert torch.equal(backend.linear(x, prepared, None, 32, quantizes_x=True), wanted)
            assert number(scaled, "launches").value - before == launches
            before += launches

    def test_many_rows_are_near_what_few_are(self, scaled: Emulator) -> None:
        """Also where float16 ends: scales that are put back are never beyond what x has."""
        assert scaled.values is not None
        weight, x = scaled_weight(70, 264, scaled.values), 3 * normal(300, 264, dtype=torch.float16)
        x[7, 3], x[8, 4] = 65504, -65504
        many = backend.linear(x, layout.prepare(weight), None, 70, quantizes_x=True)
        few = backend.linear(x[:64], layout.prepare(weight), None, 70, quantizes_x=True)
        assert products_of(x, scaled.values).isfinite().all()
        finite = few.isfinite()
        assert torch.equal(many[:64].isfinite(), finite)
        exact = expected_rounded(x[:64], weight, None).middle
        size = products_of(x[:64], scaled.values).double().abs() @ unpack(weight, torch.float32).double().abs().T
        assert bool(((many[:64].double() - exact).abs()[finite] <= 2**-9 * size[finite]).all())

    def test_views_of_what_is_rounded(self, scaled: Emulator) -> None:
        assert scaled.values is not None
        weight, wide = scaled_weight(20, 40, scaled.values), normal(9 * 80 + 1, dtype=torch.bfloat16)
        for x in (wide[:-1].view(9, 80)[:, ::2], wide[1:361].view(9, 40)):
            y = backend.linear(x, layout.prepare(weight), None, 20, quantizes_x=True)
            assert not expected_rounded(x, weight, None).wrong(y).any()

    def test_rounding_is_proven_when_a_weight_is_prepared(
        self, scaled: Emulator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert scaled.values is not None
        asked: list[torch.dtype] = []
        monkeypatch.setattr(backend.rounding, "prove", lambda device, dtype: asked.append(dtype))
        monkeypatch.setattr(narrow, "prove", lambda device, dtype: asked.append(dtype))
        monkeypatch.setattr(
            torch.cuda, "current_stream", lambda device: types.SimpleNamespace(synchronize=lambda: None)
        )
        weight = scaled_weight(8, 16, scaled.values)
        backend.prepare(weight)
        assert asked == []
        backend.prepare(dataclasses.replace(weight, quantizes_x=True))
        assert asked == [scaled.values] * 2

    def test_no_second_form(self, scaled: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
        """However it is asked for; then few rows and many go as without."""
        assert scaled.values is not None
        usual = [backend.reason(scaled.values, rows) for rows in (64, 65, 257)]
        monkeypatch.setenv(beside.VARIABLE, "1")
        monkeypatch.setattr(
            torch.cuda, "current_stream", lambda device: types.SimpleNamespace(synchronize=lambda: None)
        )
        assert [backend.reason(scaled.values, rows) for rows in (64, 65, 257)] == usual
        weight = scaled_weight(32, 64, scaled.values)
        prepared = backend.prepare(weight)
        assert torch.equal(prepared, layout.prepare(weight))
        x = normal(65, 64, dtype=torch.bfloat16)
        assert not expected_scaled(x, weight, None).wrong(backend.linear(x, prepared, None, 32)).any()

    def test_the_library_proves_itself_for_what_x_may_be(
        self, scaled: Emulator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert scaled.values is not None
        asked: list[torch.dtype] = []
        monkeypatch.setattr(backend.prefill, "prove", lambda device, dtype: asked.append(dtype))
        monkeypatch.setattr(
            torch.cuda, "current_stream", lambda device: types.SimpleNamespace(synchronize=lambda: None)
        )
        backend.prepare(scaled_weight(8, 16, scaled.values))
        assert asked == [torch.bfloat16, torch.float16]


@needs_compiler
class TestLoading:
    def test_clusters_are_as_large_as_the_device_has_them(self, fake: Emulator) -> None:
        for largest in (8, 4, 2, 1):
            number(fake, "largest_cluster").value = largest
            number(fake, "blocks_at_once").value = 100
            for form, found in load(fake, torch.bfloat16).active.items():
                sizes = [size for size in (2, 4, 8) if size <= largest]
                assert found == {1: 132 * form.resident, **{size: 100 // size for size in sizes}}
        number(fake, "blocks_at_once").value = 264

    def test_a_device_without_clusters_gets_none(self, fake: Emulator) -> None:
        assert all(set(found) == {1} for found in load(fake, torch.bfloat16, AMPERE).active.values())

    def test_a_device_with_less_shared_memory(self, fake: Emulator) -> None:
        most = number(fake, "most_shared_bytes")
        before = most.value
        most.value = 64 << 10
        with pytest.raises(DriverError, match=r"could not give a kernel [0-9]+ bytes of shared memory: 1$"):
            load(fake, torch.bfloat16)
        most.value = before

    def test_code_for_something_else(self, fake: Emulator) -> None:
        real = Driver(str(fake.path))
        with pytest.raises(DriverError, match="could not load the compiled kernels: 209"):
            real.load(b"nonsense", [])
        with pytest.raises(DriverError, match="could not find the kernel multiply_3: 500"):
            real.load(b"Float16", ["multiply_3"])

    def test_a_thread_in_which_torch_was_not_used(self, fake: Emulator) -> None:
        """There is no context there, and one is taken: that in which the kernels were loaded."""
        weight, x = random_weight(70, 40, torch.bfloat16), normal(1, 40, dtype=torch.bfloat16)
        prepared = layout.prepare(weight)
        right = backend.linear(x, prepared, None, 70)
        for context in (0, 7):
            number(fake, "context").value = context
            assert torch.equal(backend.linear(x, prepared, None, 70), right)
        assert number(fake, "context").value == 7
        number(fake, "context").value = 0
        backend.linear(x, prepared, None, 70)
        assert number(fake, "context").value == 1

    def test_no_driver(self, tmp_path: Path) -> None:
        with pytest.raises(DriverError, match=r"driver's library libnone.so.1 cannot be loaded"):
            Driver("libnone.so.1")
        old = tmp_path / "old.so"
        (tmp_path / "src").mkdir()
        (tmp_path / "src" / "old.cpp").write_text('extern "C" int cuModuleLoadData() { return 0; }\n')
        build.compile_library(old, sources=tmp_path / "src")
        with pytest.raises(DriverError, match="the NVIDIA driver is too old"):
            Driver(str(old))


class Properties:
    major, minor, multi_processor_count = 9, 0, 132


@needs_compiler
class TestProof:
    """Kernels prove themselves when they are loaded."""

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_right_ones(self, fake: Emulator, dtype: torch.dtype) -> None:
        assert backend.wrong(load(fake, dtype), torch.device("cpu"), 0) is None

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_right_ones_of_8_bits(self, scaled: Emulator, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        kernels = load(scaled, dtype)
        assert kernels.values == scaled.values
        assert backend.wrong(kernels, torch.device("cpu"), 0) is None
        monkeypatch.setattr(backend, "LINKS", 3)
        assert backend.overlaps_rightly(kernels, torch.device("cpu"), 0)

    @pytest.mark.parametrize("mistake", ["scales", "x scales", "no x scales", "small values", "a dense value"])
    def test_wrong_ones_of_8_bits(self, scaled: Emulator, mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """The scale of another row, of the weight or of x, or none of x, float8 that are lost where they are subnormal, a dense value that is off by its last bit."""
        kernels = load(scaled, torch.bfloat16)
        multiply, expand = kernels.multiply, kernels.expand

        def mistaken(x: Tensor, prepared: Tensor, bias: Tensor | None, y: Tensor, *rest: Any, **how: Any) -> None:
            weight = layout.restore(prepared)
            assert weight.scale is not None
            if mistake == "scales":
                weight.scale.copy_(weight.scale.roll(1, 0))
            elif mistake == "small values":
                limit = 2**-6 if scaled.values == torch.float8_e4m3fn else 64
                weight.values.view(torch.uint8)[weight.values.float().abs() < limit] = 0
            if mistake in ("x scales", "no x scales") and how["x_scales"] is not None:
                how["x_scales"] = how["x_scales"].roll(1) if mistake == "x scales" else None
            multiply(x, layout.prepare(weight), bias, y, *rest, **how)

        def one_bit_off(prepared: Tensor, dense: Tensor, stream: int) -> None:
            expand(prepared, dense, stream)
            if mistake == "a dense value":
                dense.view(torch.int16)[-1, int(dense[-1].nonzero()[0])] ^= 1

        monkeypatch.setattr(kernels, "multiply", mistaken)
        monkeypatch.setattr(kernels, "expand", one_bit_off)
        said = str(backend.wrong(kernels, torch.device("cpu"), 0))
        expected_words = {
            "a dense value": "that expands weights is wrong",
            "x scales": "for 8 rows of x with scales, in clusters of 1",
            "no x scales": "for 8 rows of x with scales, in clusters of 1",
        }.get(mistake, "for 8 rows of x, in clusters of 1")
        assert expected_words in said

    def test_wrong_ones(self, fake: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
        kernels = load(fake, torch.bfloat16)
        multiply, expand = kernels.multiply, kernels.expand

        def one_lane_off(x: torch.Tensor, prepared: torch.Tensor, *rest: Any, **how: Any) -> None:
            multiply(x.roll(1, 1) if len(x) == 32 and how["splits"] == 2 else x, prepared, *rest, **how)

        def one_value_off(prepared: torch.Tensor, dense: torch.Tensor, stream: int) -> None:
            expand(prepared, dense, stream)
            dense[17, 40:44] = dense[17, 40:44].roll(1)

        monkeypatch.setattr(kernels, "multiply", one_lane_off)
        said = str(backend.wrong(kernels, torch.device("cpu"), 0))
        assert "for 32 rows of x, in clusters of 2, computes wrongly" in said
        monkeypatch.setattr(kernels, "multiply", lambda *args, **how: None)
        said = str(backend.wrong(kernels, torch.device("cpu"), 0))
        assert "for 8 rows of x, in clusters of 1, computes wrongly" in said
        monkeypatch.setattr(kernels, "multiply", multiply)
        monkeypatch.setattr(kernels, "expand", one_value_off)
        assert "that expands weights is wrong" in str(backend.wrong(kernels, torch.device("cpu"), 0))

    def test_overlap_that_is_right(self, fake: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(backend, "LINKS", 3)
        assert backend.overlaps_rightly(load(fake, torch.bfloat16), torch.device("cpu"), 0)
        assert number(fake, "last_overlap").value == 1

    def test_overlap_that_reads_too_early(
        self, fake: Emulator, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(backend, "LINKS", 2)
        kernels = load(fake, torch.bfloat16)
        multiply = kernels.multiply

        def early(x: torch.Tensor, *rest: Any, **how: Any) -> None:
            multiply(x * 0 if how["overlap"] and how["splits"] > 1 else x, *rest, **how)

        monkeypatch.setattr(kernels, "multiply", early)
        assert not backend.overlaps_rightly(kernels, torch.device("cpu"), 0)
        assert "launches that overlap compute wrongly" in caplog.text


class TestWhyNot:
    @pytest.fixture
    def hopper(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
        """A torch that finds a GPU."""
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: HOPPER)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
        monkeypatch.setattr(torch.cuda, "device", lambda index: torch.no_grad())
        monkeypatch.setattr(
            torch.cuda, "current_stream", lambda: type("Stream", (), {"synchronize": lambda self: None})()
        )
        real = backend._kernels
        real.cache_clear()
        yield monkeypatch
        real.cache_clear()

    def test_other_weights(self) -> None:
        assert backend.why_not(torch.device("cpu"), torch.bfloat16) == "the weight is on cpu"
        assert backend.why_not(CUDA, torch.float32) == "values are float32"

    def test_other_builds_of_torch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.version, "cuda", None)
        assert backend.why_not(CUDA, torch.bfloat16) == "this torch is built without CUDA"

    def test_no_device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.version, "cuda", "13.0")

        def warn() -> bool:
            import warnings

            warnings.warn("the NVIDIA driver is too old", stacklevel=2)
            return False

        monkeypatch.setattr(torch.cuda, "is_available", warn)
        assert backend.why_not(CUDA, torch.bfloat16) == "torch finds no CUDA device that it can use"

    def test_an_old_device(self, hopper: pytest.MonkeyPatch) -> None:
        hopper.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
        refusal = backend.why_not(torch.device("cuda:1"), torch.float16)
        assert refusal == "the GPU has compute capability 7.5, and sparse tensor cores came with 8.0"

    def test_nothing_to_compile_with(self, hopper: pytest.MonkeyPatch) -> None:
        def refused(*args: Any) -> Any:
            raise CompilerError("NVRTC is not there; install it")

        hopper.setattr(driver, "default", lambda: None)
        hopper.setattr(compiler, "architecture", refused)
        assert backend.why_not(CUDA, torch.bfloat16) == "NVRTC is not there; install it"
        choice = choose(CUDA, torch.bfloat16, 1, 64, 64)
        assert choice.backend.name == "plain"
        assert "not cuda: NVRTC is not there; install it" in choice.reason

    def test_no_driver(self, hopper: pytest.MonkeyPatch) -> None:
        def refused() -> Any:
            raise DriverError("libcuda.so.1 cannot be loaded")

        hopper.setattr(driver, "default", refused)
        assert backend.why_not(CUDA, torch.bfloat16) == "libcuda.so.1 cannot be loaded"

    @pytest.mark.parametrize("right", [True, False])
    def test_launches_overlap_where_that_was_proven(self, hopper: pytest.MonkeyPatch, right: bool) -> None:
        hopper.setattr(driver, "default", lambda: None)
        hopper.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)
        found = backend.Kernels(None, Device(HOPPER, 132), torch.bfloat16, {}, {})  # pyright: ignore[reportArgumentType]
        hopper.setattr(backend, "load", lambda *args, **how: found)
        hopper.setattr(backend, "wrong", lambda *args: None)
        hopper.setattr(backend, "overlaps_rightly", lambda *args: right)
        assert backend.why_not(CUDA, torch.bfloat16) is None
        assert found.overlap is right

    @pytest.mark.parametrize("values", SCALED, ids=str)
    def test_of_8_bits_every_dtype_of_x_is_proven(self, hopper: pytest.MonkeyPatch, values: torch.dtype) -> None:
        loaded: list[tuple[torch.dtype, torch.dtype | None]] = []

        def load(
            device: Device, dtype: torch.dtype, of: Any, values: torch.dtype | None, measured: ways.Ways
        ) -> backend.Kernels:
            loaded.append((dtype, values))
            assert values is not None
            assert measured is ways.of("cuda", 0, values, dtype)
            return backend.Kernels(of, device, dtype, {}, {}, values=values)

        hopper.setattr(driver, "default", lambda: None)
        hopper.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)
        hopper.setattr(backend, "load", load)
        hopper.setattr(backend, "wrong", lambda kernels, *where: refusals.get(kernels.dtype))
        hopper.setattr(backend, "overlaps_rightly", lambda *args: True)
        refusals: dict[torch.dtype, str] = {}
        assert backend.why_not(CUDA, values) is None
        assert loaded == [(torch.bfloat16, values), (torch.float16, values)]
        for dtype in DTYPES:
            backend._kernels.cache_clear()
            refusals = {dtype: f"{dtype} is wrong"}
            assert backend.why_not(CUDA, values) == f"{dtype} is wrong"

    def test_kernels_that_fail(self, hopper: pytest.MonkeyPatch) -> None:
        """An address outside of the memory, say, is reported where something waits for the kernel."""

        def failed(*args: Any, **how: Any) -> Any:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with ...")

        hopper.setattr(driver, "default", lambda: None)
        hopper.setattr(backend, "load", failed)
        refusal = backend.why_not(CUDA, torch.bfloat16)
        assert refusal is not None
        assert refusal.startswith("the kernels failed on this device: CUDA error: an illegal memory access")
        assert choose(CUDA, torch.bfloat16, 1, 64, 64).backend.name == "plain"

    def test_it_is_chosen(self, hopper: pytest.MonkeyPatch) -> None:
        hopper.setattr(backend, "_kernels", lambda index, dtype: object())
        few, many = (choose(CUDA, torch.bfloat16, rows, 64, 64) for rows in (1, 257))
        assert few.backend is many.backend is dispatch.CUDA
        assert "read once past 1 rows of x" in few.reason
        assert "expanded, then multiplied densely" in many.reason


class TestPlan:
    CAPABILITIES = ((8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1))

    UNITS = (layout.UNIT_BYTES, layout.SCALED_UNIT_BYTES)

    @pytest.mark.parametrize("unit_bytes", UNITS)
    @pytest.mark.parametrize("capability", CAPABILITIES, ids=str)
    def test_every_form_fits_on_the_device(self, capability: tuple[int, int], unit_bytes: int) -> None:
        """Shared memory of a processor and of a block, in KiB, from the CUDA Programming Guide's table."""
        processor = {80: 164, 87: 164, 90: 228, 100: 228, 103: 228, 110: 228}.get(
            capability[0] * 10 + capability[1], 100
        )
        forms = plan.forms(capability, unit_bytes)
        assert sorted({form.tiles for form in forms}) == [1, 2, 4, 8]
        assert len({form.name for form in forms}) == len(forms)
        for form in forms:
            assert form.resident * (form.shared_bytes + 1024) <= processor * 1024
            assert form.shared_bytes <= (processor - 1) * 1024
            assert form.stages >= 2
            assert form.threads <= 256
            sums = (
                form.groups * 8 * form.tiles * (64 * form.panels + 4) * 4
            )  # which take the place of what is under way
            assert (
                sums
                <= form.shared_bytes
                == form.groups * form.stages * (form.panels * unit_bytes + 8 * form.tiles * 64 * 2)
            )

    @pytest.mark.parametrize("capability", CAPABILITIES, ids=str)
    def test_a_processor_has_the_same_warps_by_every_form_of_a_number_of_tiles(
        self, capability: tuple[int, int]
    ) -> None:
        for tiles in (1, 2, 4, 8):
            found = [form for form in plan.forms(capability) if form.tiles == tiles]
            assert len({form.threads * form.resident for form in found}) == 1
            assert len({form.panels for form in found}) == 1

    def test_enough_is_under_way_on_hopper(self) -> None:
        """At least 64 KB of weights for a processor: 4.8 TB/s / 132 x 1.4 us is 51 KB."""
        for unit_bytes in self.UNITS:
            for form in plan.forms(HOPPER, unit_bytes):
                assert form.bytes_ahead == (form.stages - 1) * form.groups * form.panels * unit_bytes
                assert form.resident * form.bytes_ahead >= 100 * 1024

    def test_every_number_of_rows_has_a_form(self) -> None:
        for rows in range(1, plan.MOST_ROWS + 1):
            for form in plan.for_rows(plan.forms(HOPPER), rows):
                assert 4 * form.tiles < rows <= 8 * form.tiles or form.tiles == 1

    @staticmethod
    def active(capability: tuple[int, int], processors: int, unit_bytes: int = layout.UNIT_BYTES) -> plan.Active:
        return {
            form: {splits: processors * form.resident // splits for splits in plan.possible_splits(capability)}
            for form in plan.forms(capability, unit_bytes)
        }

    def chosen(self, rows: int, n: int, k: int) -> tuple[Form, int, int]:
        """And how many blocks that makes."""
        form, splits = plan.choose(self.active(HOPPER, 132), rows, n, k, Device(HOPPER, 132))
        return form, splits, form.row_blocks(n) * splits

    @pytest.mark.parametrize("rows", [1, 16, 32, 64])
    @pytest.mark.parametrize(
        ("n", "k"),
        [(4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336), (8192, 8192), (57344, 8192), (8192, 28672)],
        ids=str,
    )
    def test_large_weights_are_read_in_one_wave(self, rows: int, n: int, k: int) -> None:
        form, _, blocks = self.chosen(rows, n, k)
        assert form.tiles == -(-rows // 8)
        assert blocks <= 132 * form.resident
        assert blocks * form.bytes_ahead >= 132 * 30e3  # enough under way for all of the memory's rate

    def test_small_weights_are_not_cut_for_nothing(self) -> None:
        assert self.chosen(1, 576, 576)[1] == 1
        assert self.chosen(1, 64, 64)[1:] == (1, 1)

    def test_few_panels_and_a_long_sum_are_cut(self) -> None:
        assert self.chosen(1, 1024, 14336)[1] == 8

    def test_only_what_the_device_runs(self) -> None:
        active = {form: {1: found[1]} for form, found in self.active(HOPPER, 132).items()}
        assert plan.choose(active, 1, 1024, 14336, Device(HOPPER, 132))[1] == 1

    def test_clusters_that_do_not_fit_at_the_same_time_cost_a_wave(self) -> None:
        form = plan.for_rows(plan.forms(HOPPER), 64)[0]
        n, k = 64 * form.panels * 16, 4096
        device = Device(HOPPER, 132)
        fits, does_not = (plan.microseconds(form, 8, clusters, n, k, device) for clusters in (16, 15))
        assert does_not > fits + 1

    def test_values_of_8_bits_take_less_time(self) -> None:
        """As many blocks, five ninths of the bytes: in what the model takes for the time, that is half of it and more."""
        device = Device(HOPPER, 132)
        for rows in (1, 64):
            times = []
            for unit_bytes in self.UNITS:
                active = self.active(HOPPER, 132, unit_bytes)
                form, splits = plan.choose(active, rows, 28672, 8192, device)
                times.append(plan.microseconds(form, splits, active[form][splits], 28672, 8192, device))
            assert 0.5 < times[1] / times[0] < (0.6 if rows == 1 else 0.8)

    @pytest.mark.parametrize("unit_bytes", UNITS)
    @pytest.mark.parametrize("capability", CAPABILITIES, ids=str)
    def test_there_is_a_way_for_every_product(self, capability: tuple[int, int], unit_bytes: int) -> None:
        active, device = self.active(capability, 20, unit_bytes), Device(capability, 20)
        for n in (0, 1, 64, 65, 1000, 100_000):
            for k in (0, 8, 72, 5000):
                for rows in (1, 9, 17, 33, 64):
                    form, splits = plan.choose(active, rows, n, k, device)
                    assert rows <= 8 * form.tiles
                    assert splits <= max(1, -(-k // 64))


def test_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, halve's operator is this backend's function."""
    from serve.kernels import ops

    assert torch._C._dispatch_has_kernel_for_dispatch_key("halve::sparse24_linear", "CUDA")
    seen: list[Any] = []
    monkeypatch.setattr(backend, "linear", lambda *given: seen.append(given))
    x: Tensor = torch.empty(1)
    ops._sparse24_linear_cuda(x, x, None, 3)
    ops._sparse24_linear_cuda(x, x, None, 3, quantizes_x=True)
    assert seen == [(x, x, None, 3, False), (x, x, None, 3, True)]
