"""Products of values of 8 bits as bytes, by the operators of torch's processor build in the place of a GPU's, and by the kernel that Triton
interprets."""

from __future__ import annotations

import logging
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from compress.packed import PackedWeight, quantize_rows, unpack
from serve.kernels import narrow
from serve.kernels.cuda import prefill
from serve.kernels.narrow import Operands
from serve.kernels.proof import problem
from tests.interpreted import interpreted
from tests.serve.cpu_reference import normal
from tests.serve.gpu_reference import SCALED, expected_rounded, scaled_weight

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
DTYPES = (torch.bfloat16, torch.float16)
each_kind = pytest.mark.parametrize("values", SCALED, ids=str)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(scope="module")
def module() -> Iterator[types.ModuleType]:
    with interpreted("serve.kernels.triton.kernels") as found:
        yield found


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """What was proven, and what was said."""
    yield
    narrow._proven.cache_clear()
    narrow._warn.cache_clear()
    narrow._tried.clear()
    narrow._refused.clear()


def operands(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Operands:
    assert weight.scale is not None
    values = weight.values.dtype
    rounded, x_scales = quantize_rows(x, values)
    dense = unpack(PackedWeight(weight.values.view(torch.uint8), weight.mask)).view(values)
    return Operands(rounded, x_scales[:, 0], dense, weight.scale[:, 0], bias, x.dtype)


def uneven(rows: int, k: int, dtype: torch.dtype) -> Tensor:
    """Rows of five sizes in turn, of which one is not finite."""
    x = normal(rows, k, dtype=torch.float32) * torch.exp2(torch.arange(rows) % 5 - 2.0)[:, None]
    x[rows // 2, 3] = torch.inf
    return x.to(dtype)


@each_kind
@each_dtype
class TestProducts:
    @pytest.mark.parametrize("with_bias", [False, True])
    @pytest.mark.parametrize(("rows", "n", "k"), [(17, 16, 16), (300, 48, 272), (257, 80, 1024)])
    def test_against_float64(
        self, values: torch.dtype, dtype: torch.dtype, rows: int, n: int, k: int, with_bias: bool,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        """A row that is not finite is NaN, and no other."""
        x, weight, bias = uneven(rows, k, dtype), scaled_weight(n, k, values), normal(n, dtype=dtype)
        given = operands(x, weight, bias if with_bias else None)
        wanted = expected_rounded(x, weight, given.bias)
        monkeypatch.setattr(narrow, "scale_on", lambda *of: narrow.scale_by_torch)
        y = narrow.linear(given, 0)
        assert y is not None
        assert (y.shape, y.dtype) == ((rows, n), dtype)
        assert y.isnan().any(1).nonzero().flatten().tolist() == [rows // 2]
        assert not wanted.wrong(y).any()

    def test_parts_of_x_have_the_bits_of_the_whole(
        self, values: torch.dtype, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """And their scales begin at multiples of 16 bytes: for others Triton would compile another kernel."""
        given = operands(uneven(300, 64, dtype), scaled_weight(32, 64, values), normal(32, dtype=dtype))
        taken: list[int] = []
        multiply = narrow.multiply

        def scale(sums: Tensor, x_scales: Tensor, scales: Tensor, bias: Tensor | None, y: Tensor) -> None:
            assert (x_scales.data_ptr() - given.x_scales.data_ptr()) % 16 == 0
            narrow.scale_by_torch(sums, x_scales, scales, bias, y)

        def counted(x: Tensor, weight: Tensor) -> Tensor:
            taken.append(len(x))
            return multiply(x, weight)

        monkeypatch.setattr(narrow, "multiply", counted)
        monkeypatch.setattr(narrow, "scale_on", lambda *of: scale)
        whole = narrow.linear(given, 0)
        monkeypatch.setattr(narrow, "_LEAST_ROWS", 48)
        monkeypatch.setattr(narrow, "MOST_SUMS", 149 * 32)
        parts = narrow.linear(given, 0)
        assert taken == [300, 96, 96, 108]  # and not 149, 149, 2
        assert parts is not None
        assert whole is not None
        assert torch.equal(parts.nan_to_num(7), whole.nan_to_num(7))

    @pytest.mark.parametrize("with_bias", [False, True])
    @pytest.mark.parametrize(("rows", "n"), [(1, 16), (17, 528), (8, 512), (9, 1040)])
    def test_the_kernel_that_scales(
        self, module: types.ModuleType, values: torch.dtype, dtype: torch.dtype, rows: int, n: int, with_bias: bool
    ) -> None:
        """Sums are what the kind of values has; beyond them nothing is written."""
        random = torch.Generator().manual_seed(rows)
        sums = torch.randint(-(2**23), 2**23, (rows, n), generator=random, dtype=torch.int32)
        if values != torch.int8:
            sums = sums.float() / 512
        x_scales, scales = (torch.rand(size, generator=random) / 2**10 for size in (rows, n))
        x_scales[rows // 2] = torch.nan
        bias = normal(n, dtype=dtype) if with_bias else None
        room = torch.full((rows + 2, n), 7, dtype=dtype)
        narrow.scale_by(module)(sums, x_scales, scales, bias, room[1:-1])
        exact = sums.double() * x_scales.double()[:, None] * scales.double() + (0 if bias is None else bias.double())
        assert bool((room[0] == 7).all() and (room[-1] == 7).all())
        by_torch = torch.empty(rows, n, dtype=dtype)
        narrow.scale_by_torch(sums, x_scales, scales, bias, by_torch)
        for y in (room[1:-1], by_torch):
            torch.testing.assert_close(y.double(), exact, rtol=torch.finfo(dtype).eps, atol=2.0**-20, equal_nan=True)
            assert bool(y[rows // 2].isnan().all())


@each_kind
class TestProof:
    def test_here_it_is_right(self, values: torch.dtype) -> None:
        for dtype in DTYPES:
            assert narrow.find(CPU, values, dtype) is narrow.scale_by_torch

    @pytest.mark.parametrize("place", [(0, 0), (135, 63), (70, 5)])
    def test_one_wrong_output_is_found(
        self, values: torch.dtype, place: tuple[int, int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """One product too few."""
        int_mm, scaled_mm = narrow._int_mm, narrow._scaled_mm
        known = problem(136, 64, 160, torch.bfloat16, values).rounded()
        x, weight = (part.double() for part in known.in_bytes())
        row, output = place
        products = x[row] * weight[output]
        lost = products[products.abs().argmax()]

        def of_int8(x: Tensor, weight: Tensor) -> Tensor:
            sums = int_mm(x, weight)
            sums[place] -= int(lost)
            return sums

        def of_float8(x: Tensor, weight: Tensor, *rest: Any, **how: Any) -> Tensor:
            y = scaled_mm(x, weight, *rest, **how)
            y[place] -= lost.float()
            return y

        monkeypatch.setattr(narrow, "_int_mm", of_int8)
        monkeypatch.setattr(narrow, "_scaled_mm", of_float8)
        found = narrow.find(CPU, values, torch.float16)
        assert "wrong on this device" in str(found)

    def test_what_torch_cannot_is_no_failure(
        self, values: torch.dtype, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """One line, whatever the dtype of x."""

        def refuse(*given: Any, **how: Any) -> Tensor:
            raise RuntimeError("needs compute capability 8.9\nand more lines")

        monkeypatch.setattr(narrow, "_int_mm", refuse)
        monkeypatch.setattr(narrow, "_scaled_mm", refuse)
        find = narrow.find
        monkeypatch.setattr(narrow, "find", lambda device, *of: find(CPU, *of))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "device", lambda index: _nothing())
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
        with caplog.at_level(logging.WARNING, "halve.serve"):
            narrow.prove(CUDA, values)
        assert not narrow.takes(CUDA, values, torch.bfloat16, 64, 64)
        [line] = [record.getMessage() for record in caplog.records]
        assert f"many rows of {str(values)[6:]} are multiplied as 16-bit numbers: RuntimeError: needs compute" in line
        assert "\n" not in line

    def test_a_kernel_that_scales_wrongly_is_not_used(self, module: types.ModuleType, values: torch.dtype) -> None:
        known = problem(136, 64, 160, torch.float16, values).rounded()
        scale = narrow.scale_by(module)
        assert narrow.wrong(scale, CPU, known) is None
        assert narrow.wrong(narrow.scale_by_torch, CPU, known) is None

        def another_row(sums: Tensor, x_scales: Tensor, *rest: Any) -> None:
            scale(sums, torch.cat([x_scales[:-2], x_scales[-1:], x_scales[-2:-1]]), *rest)

        def no_bias(sums: Tensor, x_scales: Tensor, scales: Tensor, bias: Tensor | None, y: Tensor) -> None:
            scale(sums, x_scales, scales, None, y)

        def some_bias(sums: Tensor, x_scales: Tensor, scales: Tensor, bias: Tensor | None, y: Tensor) -> None:
            scale(sums, x_scales, scales, known.bias, y)

        for mistake in (another_row, no_bias, some_bias):
            assert "wrong on this device" in str(narrow.wrong(mistake, CPU, known))


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0), (10, 3), (12, 0)])
def test_where_bytes_are_not_multiplied(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """int8 on data-centre Blackwell, float8 before Ada."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda index: _nothing())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(narrow, "find", lambda *of: narrow.scale_by_torch)
    taken = {values: narrow.takes(CUDA, values, torch.bfloat16, 64, 64) for values in SCALED}
    assert taken == {torch.int8: capability[0] != 10, torch.float8_e4m3fn: capability != (8, 0)}
    assert ("products of float8 came with 8.9" in caplog.text) == (capability == (8, 0))
    assert ("many rows of int8 are multiplied as 16-bit numbers: torch's products" in caplog.text) == (
        capability[0] == 10
    )


class _nothing:
    def __enter__(self) -> None:
        pass

    def __exit__(self, *of: object) -> None:
        pass


class TestWhatIsTaken:
    @pytest.fixture(autouse=True)
    def gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.setattr(narrow, "_proven", lambda *of: narrow.scale_by_torch)

    def test_shapes(self) -> None:
        def taken(n: int, k: int, values: torch.dtype = torch.int8) -> bool:
            return narrow.takes(CUDA, values, torch.bfloat16, n, k)

        assert taken(16, 16)
        assert taken(4096, 14336)
        assert not taken(8, 16)
        assert not taken(16, 8)
        assert not taken(0, 16)

    def test_sums_that_do_not_fit_into_int32(self) -> None:
        """Of as many products of 127 by 127 as a row can have."""
        most = narrow._MOST_INPUTS // 16 * 16
        assert most // 2 * 127**2 < 2**31 <= (most + 16) // 2 * 127**2
        for values, more in ((torch.int8, False), (torch.float8_e4m3fn, True)):
            assert narrow.takes(CUDA, values, torch.bfloat16, 16, most)
            assert narrow.takes(CUDA, values, torch.bfloat16, 16, most + 16) == more

    @pytest.mark.parametrize(
        "refusal",
        [
            "CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasLtMatmulAlgoGetHeuristic`",
            "CUDA error: HIPBLAS_STATUS_NOT_SUPPORTED when calling `HIPBLAS_STATUS_NOT_SUPPORTED`",
            "could not find valid hipblaslt solution",
        ],
    )
    def test_a_shape_that_is_refused_is_not_tried_again(
        self, refusal: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """And another one is; what else fails is an error."""
        given = operands(normal(20, 32, dtype=torch.bfloat16), scaled_weight(16, 32, torch.float8_e4m3fn), None)
        monkeypatch.setattr(narrow, "scale_on", lambda *of: narrow.scale_by_torch)
        said = f"{refusal}\nand more"

        def refuse(*given: Any, **how: Any) -> Tensor:
            raise RuntimeError(said)

        monkeypatch.setattr(narrow, "_scaled_mm", refuse)
        assert narrow.takes(CUDA, torch.float8_e4m3fn, torch.bfloat16, 16, 32)
        with caplog.at_level(logging.WARNING, "halve.serve"):
            assert narrow.linear(given, 0) is None
        [line] = [record.getMessage() for record in caplog.records]
        assert line == f"weights [16, 32] of float8_e4m3fn are multiplied as 16-bit numbers: {refusal} and more"
        assert not narrow.takes(CUDA, torch.float8_e4m3fn, torch.float16, 16, 32)
        assert narrow.takes(CUDA, torch.float8_e4m3fn, torch.bfloat16, 32, 32)
        assert narrow.takes(CUDA, torch.int8, torch.bfloat16, 16, 32)
        said = "CUDA error: an illegal memory access was encountered"
        with pytest.raises(RuntimeError, match="illegal memory access"):
            narrow.linear(given, 0)

    def test_no_more_rows_at_once_than_there_is_room_for(self) -> None:
        assert [narrow.most_rows(n) for n in (16, 4096, 57344, 1 << 20)] == [1 << 22, 16384, 1170, 1024]

    def test_not_on_a_processor(self) -> None:
        assert not narrow.takes(CPU, torch.int8, torch.bfloat16, 16, 16)

    def test_nothing_is_tried_in_a_graph(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert not narrow.takes(CUDA, torch.int8, torch.bfloat16, 16, 16)
        narrow._tried.add((0, torch.int8, torch.bfloat16))
        assert narrow.takes(CUDA, torch.int8, torch.bfloat16, 16, 16)
        assert not narrow.takes(CUDA, torch.int8, torch.float16, 16, 16)

    def test_the_library_is_proven_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[torch.dtype] = []
        monkeypatch.setattr(prefill, "prove", lambda device, dtype: asked.append(dtype))
        narrow.prove(CUDA, torch.int8)
        assert asked == [torch.int8]
