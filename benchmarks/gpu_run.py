"""What the sections of `benchmarks.gpu` share: the document that they fill, the time that is left, shapes and dense sides."""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import gpu, gpu_problems
from benchmarks.gpu_timing import LIBRARIES, Call, Weights, captured, clock, faster_dense, summary, times
from compress.errors import one_line
from serve.kernels.cuda import compiler

SHAPES = ((4096, 4096), (28672, 4096), (6144, 4096), (4096, 14336), (8192, 8192), (57344, 8192), (8192, 28672))
"""Llama-3-8B's and 70B's: [N, K]."""
ROWS = (1, 16, 64, 8, 32, 4)
MANY_ROWS = 1024
"""Of x, from which on a product takes so long that `COPIES` launches are enough."""
COPIES = 4
MANY_SHAPES = (*SHAPES[:4], (8192, 8192), (57344, 8192))
"""For many rows."""


class Run:
    """The document that grows on the disk, and the time that is left."""

    def __init__(self, directory: Path, until: float) -> None:
        self.directory, self.until = directory, until
        self.document: dict[str, Any] = {"left_out": [], "broken": {}, **gpu.read(directory)}
        self.document.setdefault("environment", environment())

    @property
    def unproven(self) -> bool:
        """Whether the kernels on sparse tensor cores refused to run, or took their process with them."""
        return "refused" in self.document or "proof" in self.document["broken"]

    def has_time(self, what: str, needed: float = 3) -> bool:
        """Whether something that takes so many seconds can still be begun; what cannot is noted."""
        if time.time() + needed < self.until:
            return True
        self.document["left_out"].append(what)
        return False

    def add(self, section: str, row: dict[str, Any]) -> None:
        """Puts a figure into the document and onto the disk."""
        self.document.setdefault(section, []).append(row)
        print(section, json.dumps(row), flush=True)
        self.write()

    def write(self) -> None:
        gpu.write(self.directory, self.document)

    def attempt(self, name: str, call: Callable[[], Any]) -> Any:
        """What a call gives, or None, and then it is noted under that name why."""
        try:
            return call()
        except Exception as error:
            self.document["broken"][name] = f"{type(error).__name__}: {one_line(error)}"
            return None

    def compare(self, what: str, sides: dict[str, list[Call]], rounds: int = 15) -> dict[str, Any]:
        """`summary` of the sides that do not break. The faster of `LIBRARIES` is ``dense``, and ``dense_by`` says which that was;
        ``sm_mhz`` is the clock at the end."""
        sound = {
            name: calls
            for name, calls in sides.items()
            if self.attempt(f"{what}, {name}", lambda calls=calls: captured(calls)) is not None
        }
        samples = times(sound, rounds)
        library, mhz = faster_dense(samples), clock()
        return {**summary(samples), "dense_by": library, "sm_mhz": mhz}

    def right(self, what: str, call: Callable[[], Tensor], x: Tensor, dense: Tensor) -> bool:
        """Whether what a call gives is x [rows, k] times ``dense`` [n, k], as far as its first and its last rows tell; if not, it is
        noted why."""

        def checked() -> bool:
            y = call()
            for some in (slice(16), slice(-16, None)):
                gpu_problems.check(y[some], x[some], dense, None, what)
            return True

        return bool(self.attempt(what, checked))


def environment() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "processors": properties.multi_processor_count,
        "torch": torch.__version__,
        "cuda": torch.version.cuda or f"none, HIP {torch.version.hip}",
        "nvrtc": _nvrtc(),
        "python": platform.python_version(),
        "system": _output(
            "nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem,power.limit", "--format=csv"
        ),
    }


def _nvrtc() -> str:
    try:
        return ".".join(map(str, compiler.version()))
    except compiler.CompilerError as error:
        return f"none ({error})"


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip()


def dense_sides(weights: Weights, x: Tensor) -> dict[str, list[Call]]:
    """cuBLAS and cublasLt."""
    return {name: enough(weights.dense_calls(x, name), x) for name in LIBRARIES}


def enough(calls: list[Call], x: Tensor) -> list[Call]:
    """Of calls that go through copies of a weight, as many as a time needs."""
    return calls[:COPIES] if len(x) >= MANY_ROWS else calls
