"""Fixtures of all tests."""

from __future__ import annotations

import os

import pytest
import torch

from compress import console
from serve.engines import vllm
from serve.kernels.cpu import library
from serve.kernels.cuda import compiler
from serve.kernels.cuda.compiler import CompilerError
from tests.runs import Halve, chromium


def pytest_configure() -> None:
    """Where kernels, vLLM, NVRTC or a browser are required, their tests must not be skipped for want of them.

    Of several processes that run tests, each gets its share of the cores, and so do those that it starts.
    """
    if processes := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
        share = max(1, len(os.sched_getaffinity(0)) // int(processes))
        os.environ.setdefault("OMP_NUM_THREADS", str(share))
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        for one in (console.out, console.err):  # they took the width that such a process is given; tests say their own
            one._width = None
    if os.environ.get("HALVE_REQUIRE_KERNELS", "") not in ("", "0") and library.load() is None:
        pytest.exit(f"HALVE_REQUIRE_KERNELS is set: {library.status()}", returncode=1)
    if os.environ.get("HALVE_REQUIRE_VLLM", "") not in ("", "0") and vllm.installed() is None:
        pytest.exit("HALVE_REQUIRE_VLLM is set, and vLLM is not installed", returncode=1)
    if os.environ.get("HALVE_REQUIRE_BROWSER", "") not in ("", "0") and chromium() is None:
        pytest.exit("HALVE_REQUIRE_BROWSER is set, and there is no Chromium", returncode=1)
    if os.environ.get("HALVE_REQUIRE_NVRTC", "") not in ("", "0"):
        try:
            compiler.version()
        except CompilerError as error:
            pytest.exit(f"HALVE_REQUIRE_NVRTC is set: {error}", returncode=1)


@pytest.fixture
def halve(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Halve:
    """The command, called inside of the test's process."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return Halve(capsys, monkeypatch)


@pytest.fixture
def plain_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed layers multiply as torch does, so that results have the bits of the dense model with zeros."""
    monkeypatch.setenv("HALVE_BACKEND", "plain")
