"""Times on a GPU: replayed CUDA graphs, sides in turn, weights that come from memory."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import gpu_problems
from serve.kernels import ops, plain
from serve.kernels.cuda import backend

COPIES_BYTES = 256 << 20
LEAST_LAUNCHES = 64
"""In a graph, of a weight of less than `LARGE_BYTES`; a quarter of them of a larger one, which takes that much longer."""
LARGE_BYTES = 64 << 20
WARM_SECONDS = 0.05
"""Before a set of sides is measured: an idle GPU's clock is a fifth of a busy one's."""
LIBRARIES = ("cublas", "cublaslt")
"""Of dense products; which one is faster differs by shape."""
DTYPE = torch.bfloat16

Call = Callable[[], Any]


def captured(calls: list[Call]) -> torch.cuda.CUDAGraph:
    """A graph of calls, each of which ran before. Whatever a call raises leaves torch on the stream that it was on."""
    current = torch.cuda.current_stream()
    stream = torch.cuda.Stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        calls[0]()
    current.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for call in calls:
                call()
    finally:
        torch.cuda.set_stream(current)
    return graph


def times(sides: dict[str, list[Call]], rounds: int = 15) -> dict[str, list[float]]:
    """Microseconds of one call, for each side and round."""
    graphs = {name: captured(calls) for name, calls in sides.items()}
    began = time.perf_counter()
    while time.perf_counter() - began < WARM_SECONDS:
        for graph in graphs.values():
            graph.replay()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds):
        for name in list(sides) if turn % 2 else reversed(sides):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            graph = graphs[name]
            graph.replay()  # while it runs, what is measured is put behind it, so nothing waits for the processor
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            found[name].append(1e3 * start.elapsed_time(end) / len(sides[name]))
    return found


def summary(samples: dict[str, list[float]], dense: str = "dense") -> dict[str, Any]:
    """Medians, and how many times faster than the dense side each one is, with quartiles."""
    gains = {}
    for name, values in samples.items():
        if name != dense and dense in samples:
            ratios = [slow / fast for slow, fast in zip(samples[dense], values, strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
            gains[name] = {"median": middle, "p25": low, "p75": high}
    return {"microseconds": {name: statistics.median(values) for name, values in samples.items()}, "speedup": gains}


def copies(weight: Tensor) -> list[Tensor]:
    """It and so many copies of it that the second cache does not hold them all."""
    return [weight, *(weight.clone() for _ in range(max(1, COPIES_BYTES // weight.nbytes)))]


class Weights:
    """Copies of one 2:4 weight [n, k], prepared and dense, more of them than the second cache holds."""

    def __init__(self, n: int, k: int, dtype: torch.dtype = DTYPE) -> None:
        self.n, self.k = n, k
        packed = gpu_problems.random_weight(n, k, dtype)
        self.packed = packed
        self.bytes = {"2:4": packed.nbytes, "dense": n * k * dtype.itemsize}
        prepared, dense = backend.prepare(packed), plain.expand(packed)
        self.prepared, self.dense = copies(prepared), copies(dense)
        torch.cuda.synchronize()

    def dense_calls(self, x: Tensor, library: str | None = None) -> list[Call]:
        """By one of `LIBRARIES`, or by the one that torch takes."""

        def call(w: Tensor) -> Tensor:
            if library is None:
                return functional.linear(x, w)
            with by(library):
                return functional.linear(x, w)

        return [lambda w=w: call(w) for w in cycled(self.dense)]

    def sparse_calls(self, x: Tensor) -> list[Call]:
        return [lambda w=w: ops.sparse24_linear(x, w, None, self.n) for w in cycled(self.prepared)]

    def direct_calls(self, kernels: backend.Kernels, x: Tensor, **how: Any) -> list[Call]:
        """The kernel itself, as it is told to."""
        y = x.new_empty(len(x), self.n)

        def call(w: Tensor) -> None:
            kernels.multiply(x, w, None, y, stream(), **how)

        return [lambda w=w: call(w) for w in cycled(self.prepared)]


@contextmanager
def by(library: str) -> Iterator[None]:
    """Dense products by one of `LIBRARIES`, as far as it has them. A captured graph keeps what was asked for then."""
    usual = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library(library)
    try:
        yield
    finally:
        torch.backends.cuda.preferred_blas_library(usual)


def clock() -> int | None:
    """Of the processors, in MHz, over the last fraction of a second; None where the system does not say."""
    try:
        return torch.cuda.clock_rate()
    except Exception:  # pynvml is not there, or raises what only it has; a figure counts without its clock
        return None


def faster_dense(samples: dict[str, list[float]]) -> str | None:
    """Puts the samples of the faster of `LIBRARIES` under the name of ``dense``, drops the other's, and says which it is; None where
    there is none."""
    found = [name for name in LIBRARIES if name in samples]
    if not found:
        return None
    best = min(found, key=lambda name: statistics.median(samples[name]))
    samples["dense"] = samples[best]
    for name in found:
        del samples[name]
    return best


def cycled(weights: list[Tensor]) -> list[Tensor]:
    """All copies in turn, some times: so many launches that the resolution of an event and a wave of the clock do not matter."""
    least = LEAST_LAUNCHES if weights[0].nbytes < LARGE_BYTES else LEAST_LAUNCHES // 4
    rounds = -(-least // len(weights))
    return list(itertools.chain.from_iterable([weights] * rounds))


def stream() -> int:
    """torch's current one, as a number."""
    return torch.cuda.current_stream().cuda_stream


def seconds(call: Call) -> float:
    """Of one call, the median of three, after one that does not count."""
    call()
    found = []
    for _ in range(3):
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def host_microseconds(call: Call) -> float:
    """How long one call keeps the processor, without a graph: the median over 20 times 100 calls."""
    samples = []
    for _ in range(20):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(100):
            call()
        samples.append(1e4 * (time.perf_counter() - began))
    return statistics.median(samples)
