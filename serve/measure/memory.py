"""How much memory a server holds: sampled while it works, and what it says of itself."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import psutil

from serve.loopback import open_url

_EVERY_SECONDS = 0.2
# vLLM says it in its log, in GiB (the second form of the cache is that of its build for processors); halve's own engine in
# /metrics.
_IN_LOG = {
    "weights": re.compile(r"Model loading took ([0-9.]+) GiB"),
    "kv_cache": re.compile(r"(?:Available KV cache memory: |\b[Ss]et \()([0-9.]+)(?:/[0-9.]+\))? GiB"),
}
_IN_METRICS = {"weights": "halve:weight_bytes", "kv_cache": "halve:kv_cache_bytes"}


class PeakMemory:
    """The most that the processes of a server hold at once, sampled by a thread while a ``with`` block lasts.

    ``resident``: bytes of the processes' resident sets (pages that they share count in each). ``gpu``: bytes on NVIDIA
    GPUs; None where there is none, or the driver does not tell it by process (as inside of many containers).
    """

    def __init__(self, processes: Callable[[], list[psutil.Process]]) -> None:
        self._processes = processes
        self._ended = threading.Event()
        self._gpu = _gpu_reader()
        self.resident = 0
        self.gpu: int | None = None

    def __enter__(self) -> Self:
        self._sample()
        self._thread = threading.Thread(target=self._run, name="halve-memory", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(_EVERY_SECONDS):
            self._sample()

    def _sample(self) -> None:
        held, pids = 0, set()
        for process in self._processes():
            with contextlib.suppress(psutil.Error):
                held += process.memory_info().rss
                pids.add(process.pid)
        self.resident = max(self.resident, held)
        on_gpu = self._gpu(pids) if self._gpu is not None else 0
        if on_gpu:
            self.gpu = max(self.gpu or 0, on_gpu)


def _gpu_reader() -> Callable[[set[int]], int] | None:
    """Bytes that processes hold on GPUs, by NVML; None where there is no NVML, no GPU, or a driver that does not tell it by process."""
    try:
        import pynvml  # type: ignore[import-not-found]
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        devices = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return None

    def held(pids: set[int]) -> int:
        try:
            running = [process for device in devices for process in pynvml.nvmlDeviceGetComputeRunningProcesses(device)]
        except pynvml.NVMLError:
            return 0
        return sum(process.usedGpuMemory or 0 for process in running if process.pid in pids)

    return held if devices else None


def told_by(base_url: str, log: str = "") -> dict[str, int]:
    """Bytes of "weights" and of the "kv_cache" that a server says it holds, where it says so."""
    found: dict[str, Any] = {}
    for name, form in _IN_LOG.items():
        if matches := form.findall(log):
            found[name] = round(float(matches[-1]) * 2**30)
    metrics = metrics_of(base_url)
    for name, metric in _IN_METRICS.items():
        if match := re.search(rf"^{metric}(?:{{[^}}]*}})? ([0-9.e+]+)$", metrics, re.MULTILINE):
            found[name] = round(float(match[1]))
    return found


def metrics_of(base_url: str) -> str:
    """What a server says at /metrics; nothing where it has none."""
    try:
        with open_url(base_url.removesuffix("/v1") + "/metrics", timeout=5) as answer:
            return answer.read().decode("utf-8", "replace")
    except (OSError, ValueError):
        return ""
