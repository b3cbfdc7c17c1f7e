"""Finds the fastest of the ways that a backend has for the products of one layer shape (`serve.kernels.ways`), and has it taken."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from compress.errors import one_line
from serve.kernels import Backend
from serve.kernels.ways import of
from serve.measure.timers import Layer, Timers, timers_on

GAINS = 1.02
"""How much faster than the guess another way has to be; less is within what a GPU's moods do to a measurement."""

_FIRST_ROUNDS, _ROUNDS = 3, 5
"""Together even: ways are timed from the first to the last, and the other way round, in turn."""
_CONTENDERS = 1.1
"""Times the fastest of the first rounds, up to which a way goes on to the others."""

log = logging.getLogger("halve.serve")


@dataclass(frozen=True)
class Settled:
    """The way that is taken for up to ``rows`` rows of x, and how many times as fast it is as the guess: 1, if that is the guess."""

    rows: int
    way: str
    gain: float


@dataclass(frozen=True)
class Product:
    """A weight [n, k] with ``values`` on a device, and the dtype of x."""

    device: torch.device
    values: torch.dtype
    dtype: torch.dtype
    n: int
    k: int


def settle(
    backend: Backend, product: Product, layers: Sequence[Layer], rows: Sequence[int], deadline: float
) -> list[Settled]:
    """Times each way of a backend for each of some of its numbers of rows; the fastest is taken from then on.

    One that fails is not taken. A number of rows for which there is not the time stays as it was.

    Args:
        layers: copies of a layer with such a weight, which goes through that backend; more of them than the last cache holds.
        rows: some of ``backend.choices.rows``, those that matter most first.
        deadline: by `time.monotonic`.
    """
    found = []
    for count in rows:
        if time.monotonic() >= deadline:
            break
        settled = _settled(backend, product, layers, count, deadline)
        if settled is not None:
            found.append(settled)
    return found


def _settled(backend: Backend, product: Product, layers: Sequence[Layer], rows: int, deadline: float) -> Settled | None:
    assert backend.choices is not None
    device, values, dtype, n, k = product.device, product.values, product.dtype, product.n, product.k
    names = backend.choices.names(device, values, dtype, rows, n, k)
    if not names:
        return None
    ways = of(backend.name, index_of(device), values, dtype)
    before, guess = ways.find(rows, n, k), names[0]
    gains: dict[str, float] | None = {guess: 1.0}
    if len(names) > 1:
        x = torch.randn(rows, k, device=device).to(dtype)

        def take(name: str) -> None:
            ways.take(rows, n, k, name)

        timers = _timers(names, take, layers, x, deadline)
        gains = None if timers is None else _gains(timers, take, guess, deadline)
    if gains is None:
        ways.take(rows, n, k, before)
        return None
    fastest = max(gains, key=lambda name: gains[name])
    best = fastest if gains[fastest] >= GAINS else guess
    ways.take(rows, n, k, best)
    return Settled(rows, best, gains[best])


def index_of(device: torch.device) -> int | None:
    """Of a GPU, as tensors on it have it; None of a processor."""
    if device.type != "cuda":
        return device.index
    return torch.cuda.current_device() if device.index is None else device.index


def _timers(
    names: Sequence[str], take: Callable[[str], None], layers: Sequence[Layer], x: torch.Tensor, deadline: float
) -> Timers | None:
    """Of each way that works; None where the time is over, or the guess does not work."""
    make, found = timers_on(x.device), Timers()
    for name in names:
        if time.monotonic() >= deadline:
            return None
        take(name)  # (which a graph that is captured keeps)
        try:
            found |= make({name: layers}, x)
        except Exception as error:  # Triton's are of no common kind
            log.info("%s does not multiply %d rows: %s", name, len(x), one_line(error))
            if name == names[0]:
                return None
    return found


def _gains(timers: Timers, take: Callable[[str], None], guess: str, deadline: float) -> dict[str, float] | None:
    """How many times as fast as the guess each way is that may be the fastest, the median over rounds; None where the time is over."""
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    left = list(timers)
    for turn in range(_FIRST_ROUNDS + _ROUNDS):
        if time.monotonic() >= deadline:
            return None
        if turn == _FIRST_ROUNDS:
            medians = {name: statistics.median(found) for name, found in seconds.items()}
            most = _CONTENDERS * min(medians.values())
            left = [name for name in timers if medians[name] <= most or name == guess]
        for name in left if turn % 2 else reversed(left):
            take(name)
            seconds[name].append(timers[name]())
    return {
        name: statistics.median([slow / fast for slow, fast in zip(seconds[guess], seconds[name], strict=True)])
        for name in left
    }
