"""cuSPARSELt's C interface, over a library that stands for it, and against its header where that is installed."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from compress.errors import UsageError
from compress.packed import LARGEST, PackedWeight, quantize_rows, unpack
from serve.kernels import narrow
from serve.kernels.cpu import build
from serve.kernels.cuda import backend, cusparselt, prefill
from serve.kernels.cuda.cusparselt import Algorithm, CusparseLt, CusparseLtError
from serve.kernels.narrow import Operands
from tests.serve.cpu_reference import normal, random_weight
from tests.serve.cuda_emulation import needs_compiler
from tests.serve.gpu_reference import expected_rounded, scaled_weight

BFLOAT16 = torch.bfloat16
STREAM = 0x5EED


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("cusparselt")
    (directory / "src").mkdir()
    shutil.copy(Path(__file__).with_name("cuda_cusparselt.cpp"), directory / "src")
    build.compile_library(directory / "libcusparseLt.so.0", sources=directory / "src", sanitize=())
    return directory / "libcusparseLt.so.0"


def count(path: Path, name: str) -> int:
    return ctypes.c_int.in_dll(ctypes.CDLL(str(path)), f"fake_{name}").value


def dense(n: int, k: int) -> Tensor:
    return unpack(random_weight(n, k, BFLOAT16))


def of_bytes(n: int, k: int, values: torch.dtype) -> Tensor:
    """A dense weight [n, k] of values of 8 bits."""
    weight = scaled_weight(n, k, values)
    return unpack(PackedWeight(weight.values.view(torch.uint8), weight.mask)).view(values)


def bytes_of_x(rows: int, k: int, values: torch.dtype) -> Tensor:
    return quantize_rows(normal(rows, k, dtype=BFLOAT16), values)[0]


@needs_compiler
class TestPlans:
    @pytest.mark.parametrize(("rows", "n", "k"), [(8, 16, 32), (1, 48, 16), (13, 32, 64), (100, 16, 16)])
    @pytest.mark.parametrize("with_bias", [False, True])
    def test_products(self, path: Path, rows: int, n: int, k: int, with_bias: bool) -> None:
        library, weight, x = CusparseLt(str(path)), dense(n, k), normal(rows, k, dtype=BFLOAT16)
        bias = normal(n, dtype=BFLOAT16) if with_bias else None
        y = library.multiply(x, library.compress(weight, STREAM), bias, n, STREAM)
        assert y.shape == (rows, n)
        assert y.is_contiguous()
        exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
        torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=1e-4)
        stream = ctypes.c_void_p.in_dll(ctypes.CDLL(str(path)), "fake_stream").value
        assert stream == STREAM

    @pytest.mark.parametrize("values", LARGEST, ids=str)
    @pytest.mark.parametrize(("rows", "n", "k"), [(16, 32, 32), (1, 96, 64), (100, 64, 224)])
    def test_products_of_bytes(self, path: Path, values: torch.dtype, rows: int, n: int, k: int) -> None:
        """Sums that nothing has rounded, by plans of their own."""
        library, weight, x = CusparseLt(str(path)), of_bytes(n, k, values), bytes_of_x(rows, k, values)
        sums = library.multiply(x, library.compress(weight, STREAM), None, n, STREAM)
        assert sums.dtype == {torch.int8: torch.int32, torch.float8_e4m3fn: torch.float32}[values]
        assert sums.shape == (rows, n)
        assert sums.is_contiguous()
        assert torch.equal(sums.double(), (x.double() @ weight.double().T).float().double())
        library.compress(dense(n, k), STREAM)
        assert {key[3] for key in library._plans} == {values, BFLOAT16}
        library.search(x, library.compress(weight, STREAM), n, STREAM)
        assert library.searched(n, k, values)
        assert not library.searched(n, k, BFLOAT16)

    def test_a_plan_is_made_once(self, path: Path) -> None:
        library, compressed = CusparseLt(str(path)), CusparseLt(str(path)).compress(dense(32, 32), 0)
        before = count(path, "plans_made")
        for _ in range(5):
            for rows in (8, 5, 24):  # 5 are padded to 8
                library.multiply(normal(rows, 32, dtype=BFLOAT16), compressed, None, 32, 0)
        assert count(path, "plans_made") - before == 2

    def test_a_bias_is_never_mistaken_for_another(self, path: Path) -> None:
        library, weight = CusparseLt(str(path)), dense(32, 32)
        compressed, x = library.compress(weight, 0), normal(8, 32, dtype=BFLOAT16)
        biases = [normal(32, dtype=BFLOAT16, seed=seed) for seed in range(3)]
        for bias in (*biases, None, *biases):
            y = library.multiply(x, compressed, bias, 32, 0)
            exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
            torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=1e-4)

    def test_old_plans_are_given_back(self, path: Path) -> None:
        library = CusparseLt(str(path), most_plans=3)
        compressed = library.compress(dense(16, 16), 0)
        plans, matrices, made = (count(path, name) for name in ("plans_alive", "matrices_alive", "plans_made"))
        for rows in (8, 16, 24, 32, 40, 8):
            library.multiply(normal(rows, 16, dtype=BFLOAT16), compressed, None, 16, 0)
        assert count(path, "plans_alive") - plans == 2  # the first one compressed
        assert count(path, "matrices_alive") - matrices == 2 * 3
        assert count(path, "plans_made") - made == 5  # that for 16 rows, which compressed, was there

    def test_what_the_search_finds_is_used(self, path: Path) -> None:
        library, weight = CusparseLt(str(path)), dense(32, 64)
        compressed, x = library.compress(weight, 0), normal(20, 64, dtype=BFLOAT16)
        before = library.multiply(x, compressed, None, 32, 0)
        assert (count(path, "algorithm"), count(path, "split")) == (0, 1)
        assert library.search(x, compressed, 32, 0) == Algorithm(17, 4, 1, 2)
        alive = count(path, "plans_alive")
        assert torch.equal(library.multiply(x, compressed, None, 32, 0), before)
        assert (count(path, "algorithm"), count(path, "split")) == (17, 4)
        assert count(path, "plans_alive") == alive + 1
        library.multiply(normal(40, 64, dtype=BFLOAT16), compressed, None, 32, 0)  # was not searched: as the nearest
        assert (count(path, "algorithm"), count(path, "split")) == (17, 4)
        other = library.compress(dense(48, 64), 0)
        library.multiply(normal(40, 64, dtype=BFLOAT16), other, None, 48, 0)  # of another shape
        assert (count(path, "algorithm"), count(path, "split")) == (0, 1)

    @pytest.mark.parametrize(("kind", "split"), [(1, -1), (2, 1)])
    def test_what_is_found_on_hopper_is_set_as_far_as_it_is_taken(
        self, path: Path, kind: int, split: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        """There, a mode that was not set is refused when it is set, and some splits are reported that are not taken."""
        hopper = ctypes.c_int.in_dll(ctypes.CDLL(str(path)), "fake_hopper")
        hopper.value = kind
        selections, matrices = count(path, "selections_alive"), count(path, "matrices_alive")
        try:
            library, weight = CusparseLt(str(path)), dense(32, 64)
            compressed, x = library.compress(weight, 0), normal(24, 64, dtype=BFLOAT16)
            library.search(x, compressed, 32, 0)
            with caplog.at_level(logging.INFO, "halve.serve"):
                y = library.multiply(x, compressed, None, 32, 0)
            assert (count(path, "algorithm"), count(path, "split")) == (17, split)
            torch.testing.assert_close(y.double(), x.double() @ weight.double().T, rtol=2**-8, atol=1e-4)
            assert ("does not take what its search found" in caplog.text) == (kind == 2)
        finally:
            hopper.value = 0
        plans = len(library._plans)
        assert count(path, "selections_alive") - selections == plans
        assert count(path, "matrices_alive") - matrices == 3 * plans

    def test_what_fails_half_way_is_given_back(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        library = CusparseLt(str(path))
        call, before = library.call, [count(path, f"{name}_alive") for name in ("selections", "matrices", "plans")]

        def refuse(name: str, *arguments: object) -> None:
            if name == "cusparseLtMatmulGetWorkspace":
                raise CusparseLtError("refused")
            call(name, *arguments)

        monkeypatch.setattr(library, "call", refuse)
        with pytest.raises(CusparseLtError):
            library.compress(dense(32, 32), 0)
        assert [count(path, f"{name}_alive") for name in ("selections", "matrices", "plans")] == before

    def test_refusals(self, path: Path) -> None:
        library = CusparseLt(str(path))
        assert library.version() == (0, 10, 1)
        with pytest.raises(CusparseLtError, match="cusparseLtMatmul refused: invalid value"):
            library.multiply(normal(8, 16, dtype=BFLOAT16), torch.zeros(600, dtype=torch.uint8), None, 16, 0)
        with pytest.raises(CusparseLtError, match="multiples of 16 outputs and inputs, not 24 and 32"):
            library.compress(dense(24, 32), 0)
        with pytest.raises(CusparseLtError, match="multiples of 32 outputs and inputs, not 48 and 32"):
            library.compress(of_bytes(48, 32, torch.int8), 0)
        with pytest.raises(CusparseLtError, match="values are float32"):
            library.compress(torch.zeros(16, 16), 0)


@needs_compiler
class TestPrefill:
    """`serve.kernels.cuda.prefill`: when the library is used, with what, and what is said when it is not."""

    @pytest.fixture
    def library(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[CusparseLt]:
        """A GPU, on the processor, with that library."""
        library = CusparseLt(str(path))
        monkeypatch.setenv(prefill.VARIABLE, "cusparselt")
        monkeypatch.setattr(cusparselt, "on_device", lambda index: library)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: STREAM, raising=False)
        monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
        device = torch.device
        monkeypatch.setattr(prefill.torch, "device", lambda *name: device("cpu"))
        prefill._proven.cache_clear()
        yield library
        prefill._proven.cache_clear()

    def test_it_is_used_for_many_rows(self, library: CusparseLt, path: Path) -> None:
        weight, bias = dense(32, 64), normal(32, dtype=BFLOAT16)
        for rows, used in ((prefill.LEAST_ROWS, True), (prefill.LEAST_ROWS - 1, False)):
            x, before = normal(rows, 64, dtype=BFLOAT16), count(path, "plans_made")
            y = prefill.linear(x, weight, bias, STREAM)
            exact = x.double() @ weight.double().T + bias.double()
            torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=1e-4)
            assert (count(path, "plans_made") > before) == used
            assert (prefill.library_for(weight, rows) is library) == used

    def test_the_search_is_done_once_for_a_shape_and_not_in_a_product(self, library: CusparseLt, path: Path) -> None:
        weight = dense(32, 64)
        prefill.search(weight, STREAM)
        assert library.searched(32, 64, BFLOAT16)
        assert {rows: found.number for rows, found in library._algorithms[32, 64, BFLOAT16].items()} == {
            2048: 17,
            8192: 17,
        }
        products = count(path, "products")
        prefill.search(weight, STREAM)
        assert count(path, "products") == products
        prefill.linear(normal(2048, 64, dtype=BFLOAT16), weight, None, STREAM)
        assert count(path, "algorithm") == 17
        prefill.search(dense(40, 24), STREAM)  # which the library does not take
        assert not library.searched(40, 24, BFLOAT16)

    @pytest.mark.parametrize("values", LARGEST, ids=str)
    def test_rows_that_are_rounded(
        self, library: CusparseLt, path: Path, values: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Many of them by the library, in parts that are compressed for once; fewer by torch."""
        monkeypatch.setattr(narrow, "scale_on", lambda device, *of: narrow.find(torch.tensor(0).device, *of))
        monkeypatch.setattr(narrow, "MOST_SUMS", 1024 * 32)
        weight, bias = scaled_weight(32, 64, values), normal(32, dtype=BFLOAT16)
        assert weight.scale is not None
        prefill.search(of_bytes(32, 64, values), STREAM)
        for rows, parts in ((prefill.LEAST_ROWS, 2), (prefill.LEAST_ROWS + 5, 3), (prefill.LEAST_ROWS - 1, 0)):
            x = normal(rows, 64, dtype=BFLOAT16)
            rounded, scales = quantize_rows(x, values)
            of = Operands(rounded, scales[:, 0], of_bytes(32, 64, values), weight.scale[:, 0], bias, BFLOAT16)
            before = count(path, "products")
            y = narrow.linear(of, STREAM)
            assert y is not None
            assert not expected_rounded(x, weight, bias).wrong(y).any()
            assert count(path, "products") - before == parts
        assert count(path, "algorithm") == 17

    @pytest.mark.parametrize("values", LARGEST, ids=str)
    def test_bytes_have_to_be_right(
        self,
        library: CusparseLt,
        values: torch.dtype,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """A thousandth of the size of a sum is found, a fiftieth of one of float8."""
        multiply = CusparseLt.multiply

        def slightly_wrong(self: CusparseLt, x: Tensor, compressed: Tensor, *rest: Any) -> Tensor:
            y = multiply(self, x, compressed, *rest)
            y[135, 63] += round(float(y.abs().max()) * (0.001 if values == torch.int8 else 0.02))
            return y

        monkeypatch.setattr(CusparseLt, "multiply", slightly_wrong)
        assert prefill.library_for(of_bytes(32, 64, values), prefill.LEAST_ROWS) is None
        assert f"its product in {str(values)[6:]} is wrong on this device" in caplog.text

    def test_shapes_that_it_does_not_take_are_dense(self, library: CusparseLt) -> None:
        x, weight = normal(2048, 24, dtype=BFLOAT16), dense(40, 24)
        assert torch.equal(prefill.linear(x, weight, None, STREAM), functional.linear(x, weight))

    @pytest.mark.parametrize("wish", [None, "dense"])
    def test_it_is_not_used_unless_asked_for(
        self, library: CusparseLt, monkeypatch: pytest.MonkeyPatch, wish: str | None
    ) -> None:
        monkeypatch.delenv(prefill.VARIABLE)
        if wish:
            monkeypatch.setenv(prefill.VARIABLE, wish)
        assert prefill.library_for(dense(32, 64), 1 << 20) is None
        assert "multiplied densely" in backend.reason(BFLOAT16, 2048)

    def test_the_reason_says_so(self, library: CusparseLt) -> None:
        assert "HALVE_PREFILL asks for it" in backend.reason(BFLOAT16, 2048)
        assert "multiplied densely" in backend.reason(BFLOAT16, 257)

    def test_a_wish_that_is_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(prefill.VARIABLE, "cusparse")
        with pytest.raises(UsageError, match=r"HALVE_PREFILL='cusparse' is not known.*cusparselt"):
            prefill.wanted()

    def test_it_has_to_be_right(
        self, library: CusparseLt, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        multiply = CusparseLt.multiply

        def slightly_wrong(self: CusparseLt, x: Tensor, *rest: Any) -> Tensor:
            y = multiply(self, x, *rest)
            y[7, 3] += 0.05 * y.abs().max()
            return y

        monkeypatch.setattr(CusparseLt, "multiply", slightly_wrong)
        weight, x = dense(32, 64), normal(2048, 64, dtype=BFLOAT16)
        for _ in range(2):
            assert torch.equal(prefill.linear(x, weight, None, STREAM), functional.linear(x, weight))
        [line] = [record.getMessage() for record in caplog.records]
        assert "many rows are multiplied densely: its product in bfloat16 is wrong on this device" in line

    def test_what_is_known_to_fail_is_not_tried(self, library: CusparseLt, caplog: pytest.LogCaptureFixture) -> None:
        assert prefill.library_for(dense(32, 64).half(), 2048) is None
        assert "float16 products are reported to fail" in caplog.text

    def test_no_library_is_no_failure(
        self, library: CusparseLt, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def missing(index: int) -> CusparseLt:
            raise CusparseLtError("cuSPARSELt cannot be used: libcusparseLt.so.0: no such file")

        monkeypatch.setattr(cusparselt, "on_device", missing)
        assert prefill.library_for(dense(32, 64), 2048) is None
        assert "multiplied densely: cuSPARSELt cannot be used: libcusparseLt.so.0" in caplog.text

    def test_a_refusal_names_the_way_out(self, library: CusparseLt, monkeypatch: pytest.MonkeyPatch) -> None:
        weight, x = dense(32, 64), normal(2048, 64, dtype=BFLOAT16)
        prefill.linear(x, weight, None, STREAM)

        def refuse(self: CusparseLt, *arguments: Any) -> Tensor:
            raise CusparseLtError("cusparseLtMatmul refused: out of memory")

        monkeypatch.setattr(CusparseLt, "multiply", refuse)
        with pytest.raises(RuntimeError, match="out of memory; HALVE_PREFILL=dense does without it"):
            prefill.linear(x, weight, None, STREAM)


def test_no_library() -> None:
    with pytest.raises(CusparseLtError, match="cuSPARSELt cannot be used: libnone"):
        CusparseLt("libnone.so.0")
    with pytest.raises(CusparseLtError, match=r"cuSPARSELt cannot be used: .*cusparseLt"):
        CusparseLt("libc.so.6")


def test_the_header_says_the_same() -> None:
    """Names, numbers of arguments, enumerations and sizes, where the wheel is installed."""
    place = Path(cusparselt.find()).parent.parent
    if not (place / "include" / "cusparseLt.h").is_file():
        pytest.skip("the wheel nvidia-cusparselt-cu13 is not installed")
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", (place / "include" / "cusparseLt.h").read_text(), flags=re.DOTALL)
    for name, arguments in cusparselt._SIGNATURES.items():
        declared = re.search(rf"\b{name}\s*\(([^)]*)\)", text)
        assert declared is not None, name
        assert len(declared[1].split(",")) == len(arguments), name
        for one, kind in zip(declared[1].split(","), arguments, strict=True):
            if "*" in one or "cudaStream_t" in one:
                assert ctypes.sizeof(kind) == 8, (name, one)
            elif wanted := {"int64_t": 8, "size_t": 8, "uint32_t": 4, "int32_t": 4}.get(one.split()[-2]):
                assert ctypes.sizeof(kind) == wanted, (name, one)
            else:
                assert kind is ctypes.c_int, (name, one)

    def enumeration(type_name: str) -> list[str]:
        body = re.search(r"typedef enum \{([^}]*)\}\s*" + type_name, text)
        assert body is not None
        return [part.split("=")[0].strip() for part in body[1].split(",") if part.strip()]

    described, algorithms = (
        enumeration("cusparseLtMatmulDescAttribute_t"),
        enumeration("cusparseLtMatmulAlgAttribute_t"),
    )
    assert described.index("CUSPARSELT_MATMUL_BIAS_POINTER") == cusparselt._BIAS_POINTER
    assert [algorithms.index(f"CUSPARSELT_MATMUL_{name}") for name in
            ("ALG_CONFIG_ID", "SPLIT_K", "SPLIT_K_MODE", "SPLIT_K_BUFFERS")] == [
        cusparselt._ALGORITHM, cusparselt._SPLIT_K, cusparselt._SPLIT_K_MODE, cusparselt._SPLIT_K_BUFFERS]  # fmt: skip
    kinds = enumeration("cusparseComputeType")
    assert kinds.index("CUSPARSE_COMPUTE_32F") == cusparselt._FLOAT_SUMS
    assert kinds.index("CUSPARSE_COMPUTE_32I") == cusparselt._INTEGER_SUMS
    version = {part: int(re.search(rf"CUSPARSELT_VER_{part}\s+(\d+)", text)[1]) for part in ("MAJOR", "MINOR")}  # type: ignore[index]
    has_it = re.search(rf"\b{cusparselt._DESTROY_SELECTION}\s*\(", text) is not None
    assert has_it == ((version["MAJOR"], version["MINOR"]) >= (0, 8))
    sizes = [int(size) for size in re.findall(r"uint8_t data\[(\d+)\]", text)]
    assert len(sizes) == 5
    assert max(sizes) <= cusparselt._ROOM
