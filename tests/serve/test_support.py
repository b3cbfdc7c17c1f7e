"""The table of support is what the code reads: where the table changes, the code behaves otherwise."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import pytest
import torch

from compress.packed import LARGEST, VALUE_DTYPES
from serve import support, vllm_plugin
from serve.engines import vllm
from serve.kernels import choose, dispatch
from serve.kernels.cpu import backend as cpu
from serve.kernels.cuda import backend as cuda
from serve.kernels.triton import layout as triton_layout
from tests.runs import ROOT, Halve, environment

CPU = torch.device("cpu")


@pytest.fixture
def alter(monkeypatch: pytest.MonkeyPatch):
    """Changes an entry of the table for a test."""

    def to(table: dict[str, Any], name: str, **fields: Any) -> None:
        monkeypatch.setitem(table, name, dataclasses.replace(table[name], **fields))

    return to


def test_the_dispatch_reads_the_dtypes(alter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HALVE_BACKEND", raising=False)
    monkeypatch.setattr(cpu, "path", lambda: "portable")  # as if the library was built
    monkeypatch.setattr(cpu, "reason", lambda dtype, rows: "a kernel")
    monkeypatch.setattr(dispatch, "BACKENDS", tuple(dataclasses.replace(b, reason=lambda d, r: "a kernel") for b in dispatch.BACKENDS))  # fmt: skip
    assert choose(CPU, torch.float16, 1, 8, 8).backend.name == "cpu"
    alter(support.KERNELS, "cpu", dtypes=("bfloat16",))
    refused = choose(CPU, torch.float16, 1, 8, 8)
    assert refused.backend.name == "plain"
    assert "not cpu: values are float16" in refused.reason
    assert choose(CPU, torch.bfloat16, 1, 8, 8).backend.name == "cpu"
    alter(support.KERNELS, "cpu", device="xpu")
    assert "not cpu: the weight is on cpu" in choose(CPU, torch.bfloat16, 1, 8, 8).reason


def test_the_cuda_backend_reads_device_dtypes_and_capability(alter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_why_no_device", lambda: None)
    monkeypatch.setattr(cuda, "_kernels", lambda index, dtype, values=None: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 6))
    device = torch.device("cuda", 0)
    assert cuda.why_not(device, torch.bfloat16) is None
    assert cuda.why_not(device, torch.int8) is None
    assert cuda.why_not(device, torch.float32) == "values are float32"
    alter(support.KERNELS, "cuda", first_capability=(9, 0))
    assert cuda.why_not(device, torch.bfloat16) == (
        "the GPU has compute capability 8.6, and sparse tensor cores came with 9.0"
    )
    alter(support.KERNELS, "cuda", first_capability=(8, 0), dtypes=("float16",))
    assert cuda.why_not(device, torch.bfloat16) == "values are bfloat16"
    assert cuda.why_not(device, torch.float16) is None


def test_the_gate_of_vllm_reads_the_versions(alter) -> None:
    assert vllm_plugin.version_problem("0.30.1") == (None, False)
    alter(support.ENGINES, "vllm", oldest=(0, 31), newest=(0, 32))
    problem, fatal = vllm_plugin.version_problem("0.30.1")
    assert fatal
    assert "needs vLLM 0.31 to 0.32" in str(problem)
    assert "may not fit" in str(vllm_plugin.version_problem("0.33.0")[0])
    assert vllm_plugin.supported() == "0.31 to 0.32"


@pytest.mark.skipif(vllm.installed() is None, reason="vLLM is not installed")
def test_the_vllm_plugin_reads_formats_and_dtypes() -> None:
    code = """
import dataclasses, torch
from serve import support
from serve.vllm.quantization import HalveQuantization

stranded = {"quant_method": "compressed-tensors", "sparsity_config": {"sparsity_structure": "2:4"}}
assert HalveQuantization.override_quantization_method(stranded, None) == "halve"
assert torch.float32 in HalveQuantization().get_supported_act_dtypes()
table = support.ENGINES["vllm"]
support.ENGINES["vllm"] = dataclasses.replace(table, kernels={"packed": ("cpu",)}, dtypes=("bfloat16",))
assert HalveQuantization.override_quantization_method(stranded, None) is None
assert HalveQuantization().get_supported_act_dtypes() == [torch.bfloat16]
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_doctor_shows_the_table(halve: Halve, alter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.console.out._width", 250)

    def rows(engine: str) -> list[dict[str, Any]]:
        return [row for row in halve("doctor", "--json").document["matrix"] if row["engine"] == engine]

    [tensorrt] = rows("tensorrt")
    assert (tensorrt["status"], tensorrt["here"], tensorrt["why_not"]) == ("not built", False, "not built")
    [on_gpu] = [row for row in rows("transformers") if row["kernel"] == "cuda"]
    assert (on_gpu["status"], on_gpu["formats"], on_gpu["dtypes"]) == (
        "needs compute capability 8.0", ["packed"], ["bfloat16", "float16", "int8", "float8_e4m3fn"],
    )  # fmt: skip
    assert on_gpu["here"] is torch.cuda.is_available()
    [plain] = [row for row in rows("transformers") if row["kernel"] == "plain"]
    assert (plain["status"], plain["here"], plain["why_not"]) == ("works", True, None)
    alter(support.ENGINES, "tensorrt", status="works", kernels={"packed": ("plain",)}, oldest=(2, 0), newest=(3, 1))
    alter(support.KERNELS, "plain", dtypes=("float32",))
    [tensorrt] = rows("tensorrt")
    assert (tensorrt["dtypes"], tensorrt["status"]) == (["float32"], "needs version 2.0 to 3.1")
    assert (tensorrt["here"], tensorrt["why_not"]) == (False, "no engine tensorrt")
    shown = halve("doctor").stdout
    assert "what runs where" in shown
    assert "packed" in shown
    assert "no engine tensorrt" in shown


def test_doctor_lists_every_engine_and_kernel_of_the_table(halve: Halve) -> None:
    document = halve("doctor", "--json").document
    assert {check["name"] for check in document["engines"]} == set(support.ENGINES)
    assert {check["name"] for check in document["kernels"]} == set(support.KERNELS)
    assert {row["engine"] for row in document["matrix"]} == set(support.ENGINES)


def test_the_table_agrees_with_what_is_built() -> None:
    """Each dtype of the table has a code in its backend, each kernel a backend; the last one takes everything."""
    dtypes = {getattr(torch, dtype) for kernel in support.KERNELS.values() for dtype in kernel.dtypes}
    assert dtypes <= set(VALUE_DTYPES.values())
    assert {getattr(torch, dtype) for dtype in support.KERNELS["cpu"].dtypes} == set(cpu._CODES)
    assert {getattr(torch, dtype) for dtype in support.KERNELS["cuda"].dtypes} == set(cuda._TYPES)
    assert {getattr(torch, dtype) for dtype in support.KERNELS["triton"].dtypes} == set(triton_layout.CODES)
    assert {str(dtype).removeprefix("torch.") for dtype in LARGEST} == set(support.SCALED)
    assert [backend.name for backend in dispatch.BACKENDS] == list(support.KERNELS)
    last = list(support.KERNELS.values())[-1]
    assert (last.device, set(last.dtypes), last.first_capability) == (None, set(VALUE_DTYPES), None)
    used = {kernel for engine in support.ENGINES.values() for kernels in engine.kernels.values() for kernel in kernels}
    assert used == {*support.KERNELS, "torch", "onnxruntime"}
    assert {form for engine in support.ENGINES.values() for form in engine.kernels} == set(support.FORMATS)


def test_it_can_be_read_without_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; from serve import support; assert len(list(support.matrix())) > 5"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
