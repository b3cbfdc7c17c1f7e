"""All sections of `benchmarks.gpu`, run on a processor: the kernels by the emulator, cuSPARSELt by the one that stands for it, and a
torch that takes the processor for its GPU. What they measure is nothing; that they run is what counts.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from benchmarks import (
    gpu,
    gpu_block,
    gpu_checks,
    gpu_checks_scaled,
    gpu_narrow,
    gpu_prefill,
    gpu_problems,
    gpu_run,
    gpu_sections,
    gpu_timing,
    gpu_variants,
)
from serve.kernels import dispatch, narrow, ops, ways
from serve.kernels.cpu import build
from serve.kernels.cuda import backend, cusparselt, driver, layout, plan, prefill
from serve.kernels.cuda.driver import Driver
from serve.kernels.triton import rounding
from serve.measure import settling, timers
from tests.interpreted import interpreted
from tests.serve.cuda_emulation import DTYPES, NAMES, compile_emulator, needs_compiler

pytestmark = needs_compiler

HOPPER = (9, 0)
FORMS = tuple(form for form in plan.forms(HOPPER) if form.groups == 1)
NAME = {torch.int8: "int8", torch.float8_e4m3fn: "float8"}
SCALED_FORMS = tuple(form for form in plan.forms(HOPPER, layout.SCALED_UNIT_BYTES) if form.groups == 1)
SHAPES = ((128, 128), (64, 192))


class OnTheProcessor(TorchFunctionMode):
    """Whatever is made on a GPU is made here."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def here(value: Any) -> Any:
            is_gpu = isinstance(value, (str, torch.device)) and str(value).startswith("cuda")
            return torch.device("cpu") if is_gpu else value

        kwargs = {name: here(value) for name, value in (kwargs or {}).items()}
        return func(*map(here, args), **kwargs)


class Stream:
    cuda_stream = 0

    def wait_stream(self, other: Any) -> None: ...
    def synchronize(self) -> None: ...


class Event:
    def __init__(self, **how: Any) -> None: ...
    def record(self) -> None: ...
    def synchronize(self) -> None: ...
    def elapsed_time(self, other: Any) -> float:
        return 1.0


class Graph:
    def replay(self) -> None: ...


@pytest.fixture
def machine(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    directory = tmp_path_factory.mktemp("gpu")
    forms = (*FORMS, *(form for form in gpu_variants.ALTERNATIVES if form.groups == 1))
    emulator = compile_emulator(directory / "emulator", HOPPER, forms=forms)
    scaled_emulators = {
        values: compile_emulator(directory / NAME[values], HOPPER, forms=SCALED_FORMS, values=values) for values in NAME
    }
    sources = directory / "library" / "src"
    sources.mkdir(parents=True)
    shutil.copy(Path(__file__).parent / "serve" / "cuda_cusparselt.cpp", sources)
    build.compile_library(directory / "libcusparseLt.so.0", sources=sources, sanitize=())
    device, loaded = plan.Device(HOPPER, 4), backend.load

    def load(
        device: plan.Device, dtype: torch.dtype, driver: Driver, forms: Any, values: torch.dtype | None = None
    ) -> backend.Kernels:
        monkeypatch.setattr(backend.compiler, "architecture", lambda capability: 90)
        monkeypatch.setattr(backend.compiler, "version", lambda: (13, 0))
        monkeypatch.setattr(backend.disk, "cubin", lambda *how: NAMES[dtype].encode())
        return loaded(device, dtype, driver, forms, values)

    emulated = Driver(str(emulator.path))
    kernels = {(dtype, None): load(device, dtype, emulated, FORMS) for dtype in DTYPES}
    for dtype in DTYPES:
        kernels[dtype, None].overlap = True
        for values, its in scaled_emulators.items():
            kernels[dtype, values] = load(device, dtype, Driver(str(its.path)), SCALED_FORMS, values)
    ways.of.cache_clear()
    kernels[gpu_timing.DTYPE, None].measured = ways.of("cuda", None, gpu_timing.DTYPE, gpu_timing.DTYPE)
    ctypes.c_int.in_dll(emulator.library, "emulated_blocks_at_once").value = 8
    library = cusparselt.CusparseLt(str(directory / "libcusparseLt.so.0"))

    properties = SimpleNamespace(name="None", major=9, minor=0, multi_processor_count=4)
    for name, fake in {
        "is_available": lambda: True,
        "current_device": lambda: None,
        "current_stream": lambda *device: Stream(),
        "get_device_properties": lambda index: properties,
        "get_device_capability": lambda *index: HOPPER,
        "max_memory_allocated": lambda: 1,
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": Graph,
        **{
            name: lambda *what: None for name in ("synchronize", "empty_cache", "set_stream", "reset_peak_memory_stats")
        },
        **{name: lambda *what: contextlib.nullcontext() for name in ("stream", "graph", "device")},
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)
    monkeypatch.setattr(torch.backends.cuda, "preferred_blas_library", lambda name=None: "cublas")
    monkeypatch.setattr(torch, "Generator", lambda *device, make=torch.Generator: make("cpu"))
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda weight: weight)
    monkeypatch.setattr(backend, "why_not", lambda device, dtype: None)
    monkeypatch.setattr(backend, "_kernels", lambda index, dtype, values=None: kernels[dtype, values])
    monkeypatch.setattr(backend, "load", load)
    monkeypatch.setattr(driver, "default", lambda: emulated)
    monkeypatch.setattr(plan, "forms", lambda capability, unit_bytes=layout.UNIT_BYTES: FORMS)
    monkeypatch.setattr(gpu_variants, "ALTERNATIVES", forms[len(FORMS) :])
    monkeypatch.setattr(cusparselt, "on_device", lambda index: library)
    monkeypatch.setattr(ops, "sparse24_linear", backend.linear)
    monkeypatch.setattr(gpu_sections.fused, "on", lambda device, kind: None)
    monkeypatch.setattr(gpu_sections.triton_backend, "why_not", lambda device, dtype: "there is no Triton")
    monkeypatch.setattr(settling, "timers_on", lambda device: timers.graph_timers)
    # Everything small.
    for module in (gpu_timing, timers):
        monkeypatch.setattr(module, "LEAST_LAUNCHES", 2)
    monkeypatch.setattr(gpu_timing, "COPIES_BYTES", 1 << 12)
    monkeypatch.setattr(gpu_timing, "WARM_SECONDS", 0.0)
    for module in (gpu_run, gpu_sections):
        monkeypatch.setattr(module, "SHAPES", SHAPES)
    monkeypatch.setattr(gpu_sections, "ROWS", (1, 64))
    monkeypatch.setattr(gpu_sections, "MANY_OF_8_BITS", 300)
    monkeypatch.setattr(gpu_prefill, "ROWS", (80, 300))
    monkeypatch.setattr(gpu_prefill, "MANY_SHAPES", SHAPES)
    monkeypatch.setattr(gpu_sections, "PRUNED", ((64, 64),))
    monkeypatch.setattr(gpu_sections, "COPIED_BYTES", 1 << 16)
    for name in ("host_microseconds", "seconds"):
        monkeypatch.setattr(gpu_sections, name, lambda call: (call(), 1.0)[1])
    monkeypatch.setattr(gpu_checks_scaled, "DEEP", (70, 200))
    monkeypatch.setattr(gpu_checks_scaled, "ODD", ((9, 72),))
    monkeypatch.setattr(gpu_checks_scaled, "ROUNDED", ((1, 8), (7, 264)))
    monkeypatch.setattr(rounding, "kernel_for", lambda device, values: None)
    monkeypatch.setattr(narrow, "scale_on", lambda device, *of: narrow.find(torch.device("cpu"), *of))
    monkeypatch.setattr(prefill, "_proven", lambda index, dtype: library)
    monkeypatch.setattr(prefill, "LEAST_ROWS", 280)
    monkeypatch.setattr(gpu_narrow, "CHECKED", ((32, 64), (64, 96)))
    monkeypatch.setattr(gpu_narrow, "COUNTS", (257, 281))
    monkeypatch.setattr(gpu_narrow, "ROWS", (300, 270))
    monkeypatch.setattr(gpu_narrow, "MANY_SHAPES", SHAPES)
    monkeypatch.setattr(gpu_checks, "FIRST", (gpu_checks.packing,))
    monkeypatch.setattr(gpu_checks, "CHECKS", (gpu_checks.packing, gpu_checks.adversarial))
    for name, value in {"HEADS": 4, "KEY_HEADS": 2, "DEPTH": 16, "HIDDEN": 64, "INTERMEDIATE": 128}.items():
        monkeypatch.setattr(gpu_block, name, value)
    monkeypatch.setattr(gpu_block, "SHAPES", ((128, 64), (64, 64), (256, 64), (64, 128)))
    cases = [gpu_block.Case("one", 1, 1, 1, 8), gpu_block.Case("many", 1, 96, 1), gpu_block.Case("some", 3, 1, 1, 8)]
    monkeypatch.setattr(gpu_block, "CASES", cases)
    with OnTheProcessor():
        yield monkeypatch
    ways.of.cache_clear()
    ctypes.c_int.in_dll(emulator.library, "emulated_blocks_at_once").value = 264


@pytest.mark.parametrize("mistake", [False, True])
def test_the_check_of_rounding(machine: pytest.MonkeyPatch, mistake: bool) -> None:
    launch = rounding.launch

    def mistaken(*given: Any) -> Any:
        rounded, scales = launch(*given)
        if mistake and len(rounded) == 7:
            scales[6] *= 1 + 2**-23
        return rounded, scales

    with interpreted("serve.kernels.triton.kernels") as module:
        machine.setattr(rounding, "kernel_for", lambda device, values: module)
        machine.setattr(rounding, "launch", mistaken)
        if mistake:
            with pytest.raises(gpu_problems.WrongError, match=r"x \[7, 264\].*Triton on the GPU has other bits"):
                gpu_checks_scaled.rounding_of_x()
        else:
            gpu_checks_scaled.rounding_of_x()


@pytest.mark.parametrize("mistake", ["the flag", "a scale of x", "the dense x"])
def test_the_check_of_rounded_inputs(machine: pytest.MonkeyPatch, mistake: str) -> None:
    round_rows, linear = rounding.round_rows, backend.linear

    def mistaken(x: torch.Tensor, values: torch.dtype, form: rounding.Form = rounding.Form.NUMBERS) -> Any:
        rounded, scales = round_rows(x, values, form)
        if mistake == "a scale of x":
            scales[-1] *= 1.05
        elif mistake == "the dense x" and form is rounding.Form.PRODUCTS:
            rounded[-1, 3] *= 1.05
        return rounded, scales

    machine.setattr(rounding, "round_rows", mistaken)
    if mistake == "the flag":
        machine.setattr(ops, "sparse24_linear", lambda *given: linear(*given[:4]))
    with pytest.raises(gpu_problems.WrongError):
        gpu_checks_scaled.rounded_x()


@pytest.mark.parametrize(("rows", "found"), [(70, True), (300, False)])
def test_only_products_of_bytes_may_lose_more(machine: pytest.MonkeyPatch, rows: int, found: bool) -> None:
    """By tensor cores that keep less of sums of float8: those are multiplied as numbers where rows are few."""
    weight = gpu_problems.random_scaled(32, 64, torch.float8_e4m3fn)
    x, bias = gpu_problems.uneven_input(rows, 64, torch.float16), gpu_problems.random_input(1, 32, torch.float16)[0]
    inputs, dense = gpu_problems.rounded_input(x, torch.float8_e4m3fn), gpu_problems.exact(weight).double()
    size = inputs.abs() @ dense.abs().T + bias.double().abs()
    y = (inputs @ dense.T + bias.double() + size * 2.0**-11).to(torch.float16)
    machine.setattr(ops, "sparse24_linear", lambda *given: y)
    with pytest.raises(gpu_problems.WrongError) if found else contextlib.nullcontext():
        gpu_checks_scaled._check_rounded(x, torch.empty(0), weight, bias, "it")


@pytest.mark.parametrize("mistake", ["the flag", "a scale of x", "a value of the weight", "a sum of the library"])
def test_the_check_of_bytes(machine: pytest.MonkeyPatch, mistake: str) -> None:
    round_rows, linear, multiply = rounding.round_rows, backend.linear, cusparselt.CusparseLt.multiply
    expand_values = backend.Kernels.expand_values

    def of_x(*given: Any) -> Any:
        rounded, scales = round_rows(*given)
        scales[-1] *= 1.05
        return rounded, scales

    def of_weight(*given: Any) -> Any:
        values, scales = expand_values(*given)
        values.view(torch.uint8)[-1, -1] ^= 1
        return values, scales

    def of_library(*given: Any) -> Any:
        sums = multiply(*given)
        sums[len(sums) // 2, 3] *= 2
        return sums

    if mistake == "the flag":
        machine.setattr(ops, "sparse24_linear", lambda *given: linear(*given[:4]))
    elif mistake == "a scale of x":
        machine.setattr(rounding, "round_rows", of_x)
    elif mistake == "a value of the weight":
        machine.setattr(backend.Kernels, "expand_values", of_weight)
    else:
        machine.setattr(cusparselt.CusparseLt, "multiply", of_library)
    with pytest.raises(gpu_problems.WrongError):
        gpu_narrow.of_bytes()


def test_the_check_of_bytes_says_what_torch_refuses(machine: pytest.MonkeyPatch) -> None:
    """And not that what is rounded otherwise then is wrong."""

    def refuse(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if len(x) != 257:  # the proof's
            return multiply(x, weight)
        raise RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling cublasLtMatmul")

    multiply = narrow.multiply
    machine.setattr(narrow, "multiply", refuse)
    machine.setattr(narrow, "_refused", set())
    with pytest.raises(gpu_problems.WrongError, match=r"257 rows, \[32, 64\].*multiplied as 16-bit numbers"):
        gpu_narrow.of_bytes()


def test_a_library_that_is_wrong_is_not_timed(machine: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where it is asked for torch multiplies instead, which is no time of the library's."""
    machine.setattr(prefill, "_proven", lambda index, dtype: None)
    run = gpu_run.Run(tmp_path, math.inf)
    gpu_narrow.measure(run)
    assert {side.partition(" ")[2] for row in run.document["narrow"] for side in row["microseconds"]} == {
        "", "dense", "dense, scaled by rows",
    }  # fmt: skip
    assert run.document["broken"] == {
        f"{name}, 300 rows, [{n}, {k}], cusparselt": "WrongError: halve does not multiply by it; the log says why"
        for name in ("int8", "float8_e4m3fn")
        for n, k in SHAPES
    }


def test_every_section_runs(machine: pytest.MonkeyPatch, tmp_path: Path) -> None:
    order: list[str] = []
    for name in ("_unsearched", "_by_cusparselt"):
        wrapped = getattr(gpu_prefill, name)
        machine.setattr(gpu_prefill, name, lambda *how, w=wrapped, name=name: (order.append(name), w(*how))[1])
    machine.setattr("sys.argv", ["gpu_sections", str(tmp_path), str(time.time() + 600), *gpu.SECTIONS])
    assert gpu_sections.main() == 0
    document = gpu.read(tmp_path)
    assert document["broken"] == {
        "pruning": "there are no fused kernels; the log says why",
        "triton": "there is no Triton",
    }
    assert document["left_out"] == []
    no_triton = "WrongError: Triton's kernel that rounds x cannot be used; the log says why"
    assert [(check["name"], check["wrong"]) for check in document["checks"]] == [
        ("packing", None), ("of_8_bits", None), ("rounding_of_x", no_triton), ("rounded_x", None), ("of_bytes", None),
        ("adversarial", None),
    ]  # fmt: skip
    assert [(row["n"], row["k"], row["rows"]) for row in document["scaled"]] == [
        (*s, r) for s in SHAPES for r in (1, 64, 300)
    ]
    of_8_bits = {f"{name}{too}" for name in ("int8", "float8_e4m3fn") for too in ("", ", x too")}
    assert all(set(row["speedup"]) == {"2:4", *of_8_bits} for row in document["scaled"])
    products = {f"{name}{end}" for name in ("int8", "float8_e4m3fn") for end in ("", " dense")} | {
        "float8_e4m3fn dense, scaled by rows"
    }
    by_library = {f"{name} {end}" for name in ("int8", "float8_e4m3fn") for end in ("sparse", "by cusparselt")}
    assert [set(row["speedup"]) - {"2:4"} for row in document["narrow"]] == [products | by_library, products] * 2
    assert all(len(row["parts"]) == 6 for row in document["narrow"])
    assert {(row["n"], row["k"], row["rows"]) for row in document["decode"]} == {
        (*s, r) for s in SHAPES for r in (1, 64)
    }
    assert all(set(row["speedup"]) == {"2:4", "2:4 waiting"} for row in document["decode"])
    assert [(row["n"], row["k"], row["rows"]) for row in document["tuned"]] == [
        (*s, r) for s in SHAPES for r in (1, 64)
    ]
    assert all(set(row["speedup"]) == {"2:4"} and row["gain"] == 1.0 for row in document["tuned"])
    assert dispatch.CUDA.choices is not None
    assert [tuple(way[:3]) for way in document["ways"]] == [(*s, r) for s in SHAPES for r in dispatch.CUDA.choices.rows]
    assert set(document["prefill"][0]["speedup"]) == {"2:4", "expanded"}
    assert all(set(row["speedup"]) == {"torch", "cusparselt", "cusparselt from ours"} for row in document["libraries"])
    assert [(row["name"], set(row["speedup"])) for row in document["block"]] == [
        ("one", {"2:4"}), ("many", {"2:4"}), ("some", {"2:4"}), ("many", {"2:4 by cusparselt", "2:4, both kept", "compressed"}),
    ]  # fmt: skip
    assert {row["dense_by"] for row in document["decode"] + document["block"]} <= {"cublas", "cublaslt"}
    assert [list(row["microseconds"]) for row in document["host"]] == [
        ["operator, 1 rows", "dense, 1 rows", "launch, 1 rows"],
        *[
            [f"{side}, {rows} rows" for side in ("operator", "dense", "cusparselt", "cusparselt's plan")]
            for rows in (300, 2048)
        ],
    ]
    clusters, *variants = document["variants"]
    assert set(clusters["clusters"]) > set(clusters["usual"]) == {form.name for form in FORMS}
    assert all(row["chosen"] in row["microseconds"] and not row["wrong"] for row in variants)
    assert len(document["unsearched"]) == 4
    assert order == ["_unsearched", "_unsearched", "_by_cusparselt", "_by_cusparselt"] * len(SHAPES)
    page = (tmp_path / "gpu.md").read_text()
    assert "| 128 x 128 | 1 | multiply_" in page
    assert document["copy_gigabytes_per_second"] == pytest.approx(2 * 65536 * 4 / 1e6)


def test_the_sections_that_follow_take_the_ways_that_were_found(machine: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Those of the process that found them, and those of the next one."""
    (n, k), *_ = SHAPES

    class Elapsed(Event):
        def elapsed_time(self, other: Any) -> float:
            return 0.5 if taken.find(8, n, k) == wanted else 1.0

    kernels = gpu_problems.loaded(gpu_timing.DTYPE)
    taken = kernels.measured
    *_, wanted = backend.CHOICES.names(torch.device("cuda"), gpu_timing.DTYPE, gpu_timing.DTYPE, 8, n, k)
    machine.setattr(torch.cuda, "Event", Elapsed)
    run = gpu_run.Run(tmp_path, math.inf)
    machine.setattr(gpu_sections, "SHAPES", SHAPES[:1])
    gpu_sections.tuned(run)
    first, *_ = run.document["tuned"]
    assert (first["way"], first["gain"]) == (wanted, 2.0)
    assert taken.find(8, n, k) == wanted
    form, splits = kernels._cut(1, n, k)
    assert plan.way_name(form, splits) == wanted
    for rows in backend.CHOICES.rows:
        taken.take(rows, n, k, None)
    gpu_sections.take_ways(gpu_run.Run(tmp_path, math.inf))
    assert taken.find(8, n, k) == wanted
    assert f"| {wanted} (2.00 of the guess) |" in (tmp_path / "gpu.md").read_text()
