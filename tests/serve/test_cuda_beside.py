"""A second form of a weight beside the first: the kernels by the emulator, cuSPARSELt by the library that stands for it."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from compress.errors import UsageError
from compress.packed import PackedWeight, unpack
from serve.kernels.cpu import build
from serve.kernels.cuda import backend, beside, cusparselt, layout, plan, prefill
from serve.kernels.cuda.cusparselt import CusparseLt, CusparseLtError
from serve.kernels.cuda.driver import Driver
from serve.kernels.cuda.layout import Second
from serve.kernels.dispatch import CUDA, Choice
from serve.kernels.triton import layout as triton_layout
from serve.measure import tuned
from serve.vllm.stored import DENSE
from tests.serve.cpu_reference import expected, normal, random_weight
from tests.serve.cuda_emulation import NAMES, Emulator, compile_emulator, needs_compiler
from tests.serve.vllm_stub import LinearBase, in_place_of_vllm

HOPPER = (9, 0)
FORMS = tuple(form for form in plan.forms(HOPPER) if form.groups == 1)
BFLOAT16, FLOAT16 = torch.bfloat16, torch.float16


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    return compile_emulator(tmp_path_factory.mktemp("beside"), HOPPER, forms=FORMS)


@pytest.fixture(scope="module")
def loaded(emulator: Emulator) -> dict[torch.dtype, backend.Kernels]:
    kernels = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend.compiler, "architecture", lambda capability: 90)
        patch.setattr(backend.compiler, "version", lambda: (13, 0))
        for dtype in (BFLOAT16, FLOAT16):
            patch.setattr(backend.disk, "cubin", lambda *how, dtype=dtype: NAMES[dtype].encode())
            kernels[dtype] = backend.load(plan.Device(HOPPER, 4), dtype, Driver(str(emulator.path)), FORMS)
    return kernels


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sources = tmp_path_factory.mktemp("library") / "src"
    sources.mkdir()
    shutil.copy(Path(__file__).with_name("cuda_cusparselt.cpp"), sources)
    build.compile_library(sources.parent / "libcusparseLt.so.0", sources=sources, sanitize=())
    return sources.parent / "libcusparseLt.so.0"


@pytest.fixture
def gpu(
    loaded: dict[torch.dtype, backend.Kernels], path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[pytest.MonkeyPatch]:
    """Two forms are asked for, on a GPU that is the processor."""
    library, device = CusparseLt(str(path)), torch.device
    monkeypatch.setenv(beside.VARIABLE, "1")
    monkeypatch.setattr(cusparselt, "on_device", lambda index: library)
    monkeypatch.setattr(backend, "_kernels", lambda index, dtype: loaded[dtype])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: HOPPER)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)
    monkeypatch.setattr(prefill.torch, "device", lambda *name: device("cpu"))
    prefill._proven.cache_clear()
    monkeypatch.setattr(beside, "_found", {})
    yield monkeypatch
    prefill._proven.cache_clear()


def prepare(weight: PackedWeight) -> Tensor:
    """As `backend.prepare` does on a GPU."""
    kernels = backend._kernels(0, weight.values.dtype)
    assert isinstance(kernels, backend.Kernels)
    return backend._for_many_rows(kernels, layout.prepare(weight), weight.shape, 0)


def launches(emulator: Emulator) -> int:
    return ctypes.c_int.in_dll(emulator.library, "emulated_launches").value


def assert_right(y: Tensor, x: Tensor, weight: PackedWeight, bias: Tensor | None) -> None:
    exact = x.double() @ unpack(weight).double().T + (0 if bias is None else bias.double())
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=1e-3)


@needs_compiler
class TestProducts:
    @pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=str)
    @pytest.mark.parametrize("way", prefill.WAYS)
    def test_few_rows_and_many(self, gpu: pytest.MonkeyPatch, emulator: Emulator, way: str, dtype: torch.dtype) -> None:
        """Few by the kernels, the same bits as without a second form; many without any kernel of ours."""
        gpu.setenv(prefill.VARIABLE, way)
        n, k = 80, 96
        weight, bias = random_weight(n, k, dtype), normal(n, dtype=dtype)
        prepared = prepare(weight)
        for rows in (1, 64, 65, 257, 2049):
            x, before = normal(rows, k, dtype=dtype), launches(emulator)
            for added in (None, bias):
                y = backend.linear(x, prepared, added, n)
                if rows <= plan.MOST_ROWS:
                    assert not expected(x, weight, added, flushes=False).wrong(y).any()
                    assert torch.equal(y, backend.linear(x, layout.prepare(weight), added, n))
                else:
                    assert_right(y, x, weight, added)
                    assert launches(emulator) == before
        x = normal(3, 50, k, dtype=dtype)
        assert backend.linear(x, prepared, bias, n).shape == (3, 50, n)

    def test_what_is_behind(self, gpu: pytest.MonkeyPatch) -> None:
        n, k = 80, 96
        for way, dtype, second, bytes_ in (
            ("dense", BFLOAT16, Second.DENSE, 2 * n * k),
            ("cusparselt", BFLOAT16, Second.CUSPARSELT, 4 + 2 * n * k),  # as long as the stand-in makes it
            ("cusparselt", FLOAT16, Second.DENSE, 2 * n * k),  # which the library is said to fail with on Hopper
        ):
            gpu.setenv(prefill.VARIABLE, way)
            weight = random_weight(n, k, dtype)
            prepared = prepare(weight)
            assert beside.find(prepared, n, k, dtype) is second
            behind = len(prepared) - layout.prepared_bytes(n, k)
            assert behind == bytes_
            assert len(prepared) > layout.prepared_bytes(n, k) > triton_layout.prepared_bytes(n, k)
            assert layout.describe(prepared) == (dtype, n, k, second)
            back = layout.restore(prepared)
            assert torch.equal(back.values.view(torch.int16), weight.values.view(torch.int16))
            assert torch.equal(back.mask, weight.mask)

    def test_a_shape_that_the_library_does_not_take_is_kept_dense(self, gpu: pytest.MonkeyPatch) -> None:
        gpu.setenv(prefill.VARIABLE, "cusparselt")
        weight, x = random_weight(40, 24, BFLOAT16), normal(100, 24, dtype=BFLOAT16)
        prepared = prepare(weight)
        assert beside.find(prepared, 40, 24, BFLOAT16) is Second.DENSE
        assert torch.equal(backend.linear(x, prepared, None, 40), functional.linear(x, unpack(weight)))

    def test_the_header_is_read_once(self, gpu: pytest.MonkeyPatch) -> None:
        """In a process that did not prepare the weight."""
        weight, x = random_weight(32, 64, BFLOAT16), normal(65, 64, dtype=BFLOAT16)
        prepared, describe = prepare(weight), layout.describe
        read: list[int] = []
        beside._found.clear()
        gpu.setattr(layout, "describe", lambda prepared: (read.append(len(prepared)), describe(prepared))[1])
        for _ in range(3):
            assert_right(backend.linear(x, prepared, None, 32), x, weight, None)
        assert len(read) == 1

    def test_it_is_searched_for_the_rows_that_it_gets(self, gpu: pytest.MonkeyPatch) -> None:
        gpu.setenv(prefill.VARIABLE, "cusparselt")
        prepare(random_weight(48, 32, BFLOAT16))
        library = cusparselt.on_device(0)
        assert tuple(library._algorithms[48, 32, BFLOAT16]) == beside.SEARCHED_ROWS

    @pytest.mark.parametrize("way", prefill.WAYS)
    def test_both_are_other_ones_where_vllm_reads_weights_anew(self, gpu: pytest.MonkeyPatch, way: str) -> None:
        """It copies them into the tensor of the first ones, because graphs hold that."""
        gpu.setenv(prefill.VARIABLE, way)
        gpu.setattr(tuned, "decision", lambda *shape: None)
        ours = dataclasses.replace(CUDA, prepare=lambda weight, name: prepare(weight))
        n, k = 80, 96
        with in_place_of_vllm() as quantization:
            gpu.setattr(sys.modules["serve.vllm.linear"], "choose", lambda *shape: Choice(ours, "it is emulated"))
            layer = LinearBase(quantization.HalveQuantization(DENSE), "layers.0.o_proj", [n], k)
            layer.read({"weight": unpack(random_weight(n, k, BFLOAT16))})
            held = layer.weight_packed
            again = random_weight(n, k, BFLOAT16, seed=1)
            layer.read_anew({"weight": unpack(again)})
            assert layer.weight_packed is held
        for rows in (3, 100):  # by the first form, and by the second
            x = normal(rows, k, dtype=BFLOAT16)
            assert_right(backend.linear(x, held, None, n), x, again, None)

    def test_one_form_unless_asked(self, gpu: pytest.MonkeyPatch) -> None:
        weight = random_weight(48, 32, BFLOAT16)
        for wish in ("0", ""):
            gpu.setenv(beside.VARIABLE, wish)
            assert torch.equal(prepare(weight), layout.prepare(weight))


@needs_compiler
class TestRefusals:
    def test_what_is_no_prepared_weight(self, gpu: pytest.MonkeyPatch) -> None:
        weight, x = random_weight(32, 64, BFLOAT16), normal(65, 64, dtype=BFLOAT16)
        prepared = prepare(weight)
        longer = torch.cat([prepared, prepared[:512]])
        for bad in (prepared[:-2], longer, torch.cat([layout.prepare(weight), prepared[:100]])):
            with pytest.raises(ValueError, match="damaged, or no prepared weight at all"):
                backend.linear(x, bad, None, 32)
        with pytest.raises(ValueError, match=r"this is a prepared weight \[32, 64\].*, not \[16, 64\]"):
            backend.linear(x, prepared, None, 16)
        with pytest.raises(ValueError, match=r"in torch.bfloat16, not \[32, 64\] in torch.float16"):
            backend.linear(x.half(), prepared, None, 32)
        unknown = prepared.clone()
        unknown[16] = 7  # the kind of the second form
        with pytest.raises(ValueError, match="damaged"):
            layout.restore(unknown)

    def test_there_are_never_three(self, gpu: pytest.MonkeyPatch) -> None:
        prepared = prepare(random_weight(32, 64, BFLOAT16))
        with pytest.raises(ValueError, match="second form behind this prepared weight already"):
            layout.append(prepared, Second.DENSE, prepared[:64])

    def test_a_wish_that_is_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(beside.VARIABLE, "yes")
        with pytest.raises(UsageError, match="HALVE_KEEP_BOTH='yes' is neither 1"):
            beside.wanted()

    def test_a_library_that_refuses_names_the_way_out(self, gpu: pytest.MonkeyPatch) -> None:
        gpu.setenv(prefill.VARIABLE, "cusparselt")
        weight, x = random_weight(32, 64, BFLOAT16), normal(65, 64, dtype=BFLOAT16)
        prepared = prepare(weight)

        def refuse(self: CusparseLt, *arguments: object) -> Tensor:
            raise CusparseLtError("cusparseLtMatmul refused: out of memory")

        gpu.setattr(CusparseLt, "multiply", refuse)
        with pytest.raises(RuntimeError, match="out of memory; HALVE_PREFILL=dense does without it"):
            backend.linear(x, prepared, None, 32)
        gpu.setattr(CusparseLt, "compress", refuse)
        with pytest.raises(RuntimeError, match="out of memory; HALVE_PREFILL=dense does without it"):
            prepare(weight)

    def test_the_reason_says_so(self, gpu: pytest.MonkeyPatch) -> None:
        assert backend.reason(BFLOAT16, 65) == "dense, by a second form of the weight; HALVE_KEEP_BOTH asks for it"
        gpu.setenv(prefill.VARIABLE, "cusparselt")
        assert backend.reason(BFLOAT16, 65).startswith("cuSPARSELt where it can, else dense, by a second form")
        assert "read once past 64 rows" in backend.reason(BFLOAT16, 64)
