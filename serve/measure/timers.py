"""Seconds of one call of a layer, of which there are enough copies that each comes from the memory."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

LEAST_LAUNCHES = 16
"""In a graph: fewer would be over before the next one is put behind them."""

Layer = Callable[[Tensor], Any]
Timers = dict[str, Callable[[], float]]


def timers_on(device: torch.device) -> Callable[[Mapping[str, Sequence[Layer]], Tensor], Timers]:
    """How layers are timed there."""
    return graph_timers if device.type == "cuda" else call_timers


def call_timers(sides: Mapping[str, Sequence[Layer]], x: Tensor) -> Timers:
    """For each side: seconds of one call, of the next copy each time."""

    def timer(copies: Sequence[Layer]) -> Callable[[], float]:
        turns: Iterator[Layer] = itertools.cycle(copies)
        next(turns)(x)  # warm-up

        def call() -> float:
            layer = next(turns)
            started = time.perf_counter()
            layer(x)
            return time.perf_counter() - started

        return call

    return {name: timer(copies) for name, copies in sides.items()}


def graph_timers(sides: Mapping[str, Sequence[Layer]], x: Tensor) -> Timers:
    """For each side: seconds of one call, the mean over a replay of all copies in turn, by CUDA events. A replay that does not count
    goes first: what is measured is put behind it while it runs, so that nothing waits for the processor."""

    def timer(copies: Sequence[Layer]) -> Callable[[], float]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # a warm-up outside of the capture: libraries allocate at their first call
            for layer in copies[:2]:
                layer(x)
        torch.cuda.current_stream().wait_stream(stream)
        launches = [layer for _ in range(-(-LEAST_LAUNCHES // len(copies))) for layer in copies]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for layer in launches:
                layer(x)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        graph.replay()

        def replay() -> float:
            graph.replay()
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) / 1e3 / len(launches)

        return replay

    return {name: timer(copies) for name, copies in sides.items()}
