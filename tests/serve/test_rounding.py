"""x rounded to values of 8 bits: the Triton kernel, which Triton interprets, has the bits of `compress.packed.quantize_rows`."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from compress.packed import LARGEST, quantize_rows
from serve.kernels.triton import rounding
from serve.kernels.triton.rounding import Form
from tests.interpreted import interpreted
from tests.serve.cpu_reference import normal

DTYPES = (torch.bfloat16, torch.float16)
each_kind = pytest.mark.parametrize("values", list(LARGEST), ids=str)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(scope="module")
def module() -> Iterator[types.ModuleType]:
    with interpreted("serve.kernels.triton.kernels") as found:
        yield found


def check(module: types.ModuleType, x: Tensor, values: torch.dtype) -> None:
    """All forms, to the bit."""
    right, scale = quantize_rows(x, values)
    expected = {
        Form.BYTES: right,
        Form.NUMBERS: right.to(x.dtype),
        Form.PRODUCTS: (right.float() * scale).to(x.dtype),
    }
    assert set(expected) == set(Form)
    for form, wanted in expected.items():
        for found, scales in (rounding.launch(module, x, values, form), rounding.by_torch(x, values, form)):
            assert found.dtype == wanted.dtype
            assert rounding.is_same(found, wanted), form
            assert rounding.is_same(scales, scale[:, 0])


@each_kind
@each_dtype
class TestBits:
    @pytest.mark.parametrize("k", [8, 264, rounding.BLOCK, rounding.BLOCK + 8, 2 * rounding.BLOCK + 1032])
    def test_random(self, module: types.ModuleType, values: torch.dtype, dtype: torch.dtype, k: int) -> None:
        x = normal(4, k, dtype=torch.float32)
        x[1] *= 1e-4
        x[2] *= 3e4
        check(module, x.to(dtype), values)

    def test_every_number_there_is(self, module: types.ModuleType, values: torch.dtype, dtype: torch.dtype) -> None:
        """Of the dtype, beside a number that makes the scale 1, or something that is no power of two: also what is subnormal."""
        every = torch.arange(1 << 16).to(torch.int16).view(dtype)
        every = every[every.isfinite()]
        for largest in (LARGEST[values], LARGEST[values] / 7, 1.0):
            x = every[every.abs() <= largest]
            x = torch.cat([x, torch.zeros(-len(x) % 8, dtype=dtype)])
            x[-1] = largest
            check(module, x.view(1, -1), values)

    def test_hard_rows(self, module: types.ModuleType, values: torch.dtype, dtype: torch.dtype) -> None:
        for k in (16, 264):
            x = rounding.hard_rows(k, dtype, values)
            check(module, x, values)
            rounded, scale = quantize_rows(x, values)
            assert scale[:, 0].isnan().tolist() == [False] * 7 + [True] * 2
            inverse = (x.float() / scale)[3]  # ties occur
            halves = inverse.remainder(1) == 0.5 if values == torch.int8 else inverse != rounded.float()[3]
            assert int(halves.sum()) > k // 8

    def test_tiny_rows(self, module: types.ModuleType, values: torch.dtype, dtype: torch.dtype) -> None:
        """All smaller than the least size of a scale (of float16 nothing is), and around it."""
        tiny = normal(3, 24, dtype=torch.float32) * torch.tensor([[2.0**-102], [2.0**-99], [2.0**-125]])
        tiny[0] *= -1
        check(module, tiny.to(dtype), values)

    @pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
    @pytest.mark.parametrize("place", [0, 7, rounding.BLOCK, rounding.BLOCK + 7])
    def test_what_is_not_finite(
        self, module: types.ModuleType, values: torch.dtype, dtype: torch.dtype, bad: float, place: int
    ) -> None:
        """Its row alone has no scale, and zeros."""
        x = normal(3, rounding.BLOCK + 8, dtype=dtype)
        x[1, place] = bad
        check(module, x, values)
        found, scales = rounding.launch(module, x, values, Form.BYTES)
        assert scales.isnan().tolist() == [False, True, False]
        assert not found[1].view(torch.uint8).any()

    def test_no_rows(self, module: types.ModuleType, values: torch.dtype, dtype: torch.dtype) -> None:
        for form in Form:
            found, scales = rounding.launch(module, normal(0, 16, dtype=dtype), values, form)
            assert (found.shape, scales.shape) == ((0, 16), (0,))


@each_kind
class TestProof:
    """Where the kernel is used."""

    def test_a_right_one(self, module: types.ModuleType, values: torch.dtype) -> None:
        assert rounding.wrong(module, torch.device("cpu"), values) is None

    @pytest.mark.parametrize("mistake", ["a value", "a scale", "a zero's sign", "a row that is not finite"])
    def test_a_wrong_one_is_found(
        self, module: types.ModuleType, values: torch.dtype, mistake: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        launch = rounding.launch

        def mistaken(*given: Any) -> tuple[Tensor, Tensor]:
            rounded, scales = launch(*given)
            if mistake == "a value":
                rounded.view(torch.uint8)[2, 5] ^= 1
            elif mistake == "a scale":
                scales.view(torch.int32)[2] ^= 1
            elif mistake == "a zero's sign":
                if given[-1] is Form.NUMBERS:
                    rounded[4, 3] = -0.0
            else:
                scales[7] = 1.0
            return rounded, scales

        monkeypatch.setattr(rounding, "launch", mistaken)
        assert "please report it" in str(rounding.wrong(module, torch.device("cpu"), values))

    @pytest.fixture
    def a_gpu(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
        """One whose tensors are on the processor."""
        device = torch.device
        monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.setattr(rounding.torch, "device", lambda *name: device("cpu"))
        rounding._proven.cache_clear()
        rounding._tried.clear()
        yield device("cuda", 0)
        rounding._proven.cache_clear()
        rounding._tried.clear()

    def test_it_is_used_once_it_is_proven(
        self, module: types.ModuleType, values: torch.dtype, a_gpu: torch.device, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(rounding.importlib, "import_module", lambda name: module)
        assert rounding.kernel_for(torch.empty(0).device, values) is None  # (on a processor)
        assert rounding.kernel_for(a_gpu, values) is module

    def test_it_is_not_tried_while_a_graph_is_captured(
        self, module: types.ModuleType, values: torch.dtype, a_gpu: torch.device, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(rounding.importlib, "import_module", lambda name: module)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert rounding.kernel_for(a_gpu, values) is None
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        rounding.prove(a_gpu, values)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert rounding.kernel_for(a_gpu, values) is module

    def test_torch_does_it_where_triton_is_missing(
        self,
        values: torch.dtype,
        a_gpu: torch.device,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        def missing(name: str) -> types.ModuleType:
            raise ImportError("No module named 'triton'")

        monkeypatch.setattr(rounding.importlib, "import_module", missing)
        for _ in range(2):
            assert rounding.kernel_for(a_gpu, values) is None
        [line] = [record.getMessage() for record in caplog.records]
        assert line.endswith("take longer: ImportError: No module named 'triton'")

    def test_torch_does_it_where_the_kernel_is_wrong(
        self, module: types.ModuleType, values: torch.dtype, a_gpu: torch.device, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(rounding.importlib, "import_module", lambda name: module)
        monkeypatch.setattr(rounding, "wrong", lambda *given: "it is wrong")
        assert rounding.kernel_for(a_gpu, values) is None
