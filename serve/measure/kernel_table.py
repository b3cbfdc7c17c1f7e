"""Sparse against dense, one layer at a time: for each shape of a model and each number of rows of x.

What is timed are the very modules that the transformers engine runs, as `prepare_for_serving` leaves them: a packed layer for each
backend that can run it, and
the dense one in its place (on a processor, halve's own dense kernel up to 16 rows, torch's product above, in float32 where the
processor has no other). All take turns in
every round, on copies of the weight that are more than the last cache holds together; a figure is the median over the rounds
of the ratio within a round, with the quartiles. On a GPU one replay of a CUDA graph runs all copies, so that what is timed is
the kernels and not Python's calls.
"""

from __future__ import annotations

import datetime
import logging
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from compress.errors import one_line
from compress.packed import LARGEST, PackedWeight, bytes_of, quantize
from compress.wide import is_emulated
from serve.kernels import able, choose
from serve.linear import LinearModule, Sparse24Linear, StreamedLinear, prepare_for_serving, replacement
from serve.measure import settling
from serve.measure.kernel_entries import Entry, Failure, Measured, Shape, Spread, Way, kind_name
from serve.measure.speed import ratio
from serve.measure.timers import timers_on

ROWS = (1, 2, 4, 8, 16, 64, 256, 1024)
"""Rows of x: sequences that are decoded at once, or tokens of prompts."""

_ROUNDS = (5, 41)  # fewest, most
_SECONDS = 0.4  # for one shape and number of rows, if the fewest rounds take less
_UNKNOWN_CACHE = 128 << 20
_DENSE = "dense"

log = logging.getLogger("halve.serve")
Progress = Callable[[int, int, str], None]


@torch.inference_mode()
def measure(
    wanted: Iterable[tuple[Shape, int]],
    *,
    dtype: torch.dtype,
    device: torch.device,
    budget: float,
    value_dtype: torch.dtype | None = None,
    quantizes_x: bool = False,
    leave_out: Collection[tuple[Shape, str]] = (),
    settled: Collection[tuple[Shape, str, int]] = (),
    progress: Progress = lambda done, total, text: None,
) -> Measured:
    """Times sparse against dense.

    Args:
        wanted: shapes with numbers of rows, the most important rows of each shape first.
        dtype: of x and of the dense weight; ``value_dtype``: of the packed values, left out: the same; ``quantizes_x``: see
            `PackedWeight`.
        budget: seconds; each shape gets its share of what is left, and what does not fit is not begun.
        leave_out: backends that are not tried for a shape.
        settled: shapes, backends and rows of x for which the fastest way is known and taken (`serve.measure.settling`). The others' are found
            first, in a third of the time that the shape has.
    """
    by_shape: dict[Shape, list[int]] = {}
    for shape, rows in wanted:
        by_shape.setdefault(shape, []).append(rows)
    deadline = time.monotonic() + budget
    found = Measured([], [], [])
    failures: list[Failure] = []
    ways: list[Way] = []
    total, done = sum(map(len, by_shape.values())), 0
    for index, (shape, rows_of_x) in enumerate(by_shape.items()):
        now = time.monotonic()
        if now >= deadline:
            found.skipped.extend((shape, rows) for rows in rows_of_x)
            continue
        share = now + (deadline - now) / (len(by_shape) - index)
        left_out = {name for at, name in leave_out if at == shape}
        sides = _Sides(shape, dtype, value_dtype or dtype, device, left_out, quantizes_x)
        ways += sides.settle({(name, rows) for at, name, rows in settled if at == shape}, now + (share - now) / 3)
        entries: list[Entry] = []
        for rows in rows_of_x:
            done += 1
            if time.monotonic() >= share:
                found.skipped.append((shape, rows))
                continue
            entries += (new := sides.measure(rows, share))
            progress(done, total, f"{shape}, {rows} rows: {max(e.ratio.median for e in new):.2f} times as fast")
        failed = {failure.backend for failure in sides.failures}
        found.entries.extend(entry for entry in entries if entry.backend not in failed)
        failures += sides.failures
    return replace(found, failures=failures, ways=ways)


def copies(shape: Shape, dtype: torch.dtype, values: torch.dtype, device: torch.device) -> int:
    """How many of each form there have to be, so that each comes from the memory and not from the last cache.

    On a processor sides take turns after each call, so copies of both fill the cache. On a GPU a side goes through all of its copies in
    one replay, and sometimes twice in a row, so those of the smaller form have to.
    """
    dense = shape.n * shape.k * dtype.itemsize
    sparse = bytes_of(shape.n, shape.k, values)
    turn = sparse if device.type == "cuda" else dense + sparse
    return max(2, -(-2 * last_cache_bytes(device) // turn))


class _Sides:
    """Copies of a dense layer, and of a packed one for each backend, enough of them that no weight is in a cache when its turn comes."""

    def __init__(
        self,
        shape: Shape,
        dtype: torch.dtype,
        values: torch.dtype,
        device: torch.device,
        leave_out: Collection[str] = (),
        quantizes_x: bool = False,
    ) -> None:
        self.shape, self.dtype, self.values, self.device = shape, dtype, values, device
        self.kind, self.quantizes_x = kind_name(dtype, values, quantizes_x), quantizes_x
        self.copies = copies(shape, dtype, values, device)
        self.backends = [backend.name for backend in able(device, values, dtype) if backend.name not in leave_out]
        self.failures: list[Failure] = []
        self.sides: dict[str, list[nn.Module]] = {_DENSE: [_dense(shape, dtype, device) for _ in range(self.copies)]}
        for name in self.backends:
            self.sides[name] = [_sparse(shape, dtype, values, quantizes_x, device, name) for _ in range(self.copies)]
        for side, modules in self.sides.items():
            prepared = nn.ModuleList(modules)
            prepare_for_serving(prepared)
            self.sides[side] = list(prepared)

    def settle(self, known: Collection[tuple[str, int]], deadline: float) -> list[Way]:
        """Finds the fastest way of each backend that has several, but for those that are known by the backend and the rows of x."""
        product = settling.Product(self.device, self.values, self.dtype, self.shape.n, self.shape.k)
        by_name = {backend.name: backend for backend in able(self.device, self.values, self.dtype)}
        return [
            Way(**asdict(self.shape), **asdict(found), dtype=self.kind, backend=name, date=_today())
            for name in self.backends
            if (choices := by_name[name].choices) is not None
            for found in settling.settle(
                by_name[name],
                product,
                self.sides[name],
                [rows for rows in choices.rows if (name, rows) not in known],
                deadline,
            )
        ]

    def measure(self, rows: int, deadline: float) -> list[Entry]:
        """One entry for each backend. One that fails is left out from now on, but for the first, which is needed."""
        x = torch.randn(rows, self.shape.k, device=self.device).to(self.dtype)
        make = timers_on(self.device)
        timers: dict[str, Callable[[], float]] = {}
        for name, copies in list(self.sides.items()):
            try:
                timers |= make({name: copies}, x)
            except Exception as error:  # Triton's are of no common kind
                if name in (_DENSE, self.backends[0]):
                    raise
                self.backends.remove(name)
                del self.sides[name]
                if isinstance(error, torch.OutOfMemoryError):  # of this moment, not of this backend
                    log.warning("%s is not measured for %s at %d rows: %s", name, self.shape, rows, one_line(error))
                    continue
                log.warning("%s does not serve %s, it fails at %d rows: %s", name, self.shape, rows, one_line(error))
                self.failures.append(
                    Failure(
                        **asdict(self.shape),
                        dtype=self.kind,
                        backend=name,
                        reason=f"at {rows} rows: {one_line(error)}",
                        date=_today(),
                    )
                )
        seconds: dict[str, list[float]] = {name: [] for name in timers}
        until = min(deadline, time.monotonic() + _SECONDS)
        for turn in range(_ROUNDS[1]):
            for name in list(timers) if turn % 2 else reversed(timers):
                seconds[name].append(timers[name]())
            if turn + 1 >= _ROUNDS[0] and time.monotonic() >= until:
                break
        return [self._entry(name, rows, seconds[name], seconds[_DENSE]) for name in self.backends]

    def _entry(self, backend: str, rows: int, sparse: list[float], dense: list[float]) -> Entry:
        shape = (self.shape.n, self.shape.k)
        liked = None if backend == self.backends[0] else backend
        choice = choose(self.device, self.values, rows, *shape, liked, self.dtype, self.quantizes_x)
        return Entry(
            n=self.shape.n,
            k=self.shape.k,
            conv1d=self.shape.conv1d,
            dtype=self.kind,
            rows=rows,
            ratio=Spread(**ratio(sparse, dense)),
            sparse_seconds=statistics.median(sparse),
            dense_seconds=statistics.median(dense),
            backend=backend,
            reason=choice.reason if backend == self.backends[0] else choice.backend.reason(self.values, rows),
            baseline=_baseline(self.sides[_DENSE][0], rows),
            rounds=len(dense),
            date=_today(),
        )


def _today() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")


def _dense(shape: Shape, dtype: torch.dtype, device: torch.device) -> LinearModule:
    layer = empty_layer(shape, dtype, device)
    for parameter in layer.parameters():
        parameter.requires_grad_(False).copy_(noise(parameter.shape, dtype))
    return layer


def _sparse(
    shape: Shape, dtype: torch.dtype, values: torch.dtype, quantizes_x: bool, device: torch.device, backend: str
) -> Sparse24Linear:
    layer = random_packed(empty_layer(shape, dtype, torch.device("meta")), dtype, device, values, quantizes_x)
    layer.preferred = backend
    return layer


def empty_layer(shape: Shape, dtype: torch.dtype, device: torch.device) -> LinearModule:
    """A layer of the kind that the model has there; its weights are what was in the memory."""
    with torch.device("meta"):  # without the initialization of the weights, which takes longer than all the rest
        layer = Conv1D(shape.n, shape.k) if shape.conv1d else nn.Linear(shape.k, shape.n, bias=False)
    return layer.to(dtype).to_empty(device=device)


def random_packed(
    layer: LinearModule,
    dtype: torch.dtype,
    device: torch.device,
    value_dtype: torch.dtype | None = None,
    quantizes_x: bool = False,
) -> Sparse24Linear:
    """A packed layer with random values in the place of a linear (whose own weight may be on the meta device)."""
    packed = replacement(layer, dtype, value_dtype, quantizes_x)
    packed.to_empty(device=device)
    n, k = packed.out_features, packed.in_features
    weight = random_packed_weight(n, k, dtype)
    if packed.value_dtype in LARGEST:
        weight = quantize(weight, packed.value_dtype)
    with torch.no_grad():
        packed.weight_packed.copy_(weight.values)
        packed.weight_mask.copy_(weight.mask)
        if packed.weight_scale is not None and weight.scale is not None:
            packed.weight_scale.copy_(weight.scale)
        if packed.bias is not None:
            packed.bias.copy_(noise(packed.bias.shape, dtype))
    return packed


_PERIOD = 65537
"""Random numbers that are drawn; larger tensors repeat them. No power of two, so that no two rows are alike."""


def noise(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Random numbers around zero; speed does not depend on which."""
    drawn = (0.02 * torch.randn(_PERIOD, generator=torch.Generator().manual_seed(0))).to(dtype)
    return _repeated(drawn, shape)


def random_packed_weight(n: int, k: int, dtype: torch.dtype) -> PackedWeight:
    """A packed weight [n, k]; its mask keeps a random two of every four."""
    nibbles = torch.tensor([0b0011, 0b0101, 0b1001, 0b0110, 0b1010, 0b1100], dtype=torch.uint8)
    generator = torch.Generator().manual_seed(1)
    low, high = (nibbles[torch.randint(6, (_PERIOD,), generator=generator)] for _ in range(2))
    values = noise((n, k // 2), dtype)
    return PackedWeight(
        torch.where(values == 0, torch.ones((), dtype=dtype), values), _repeated(low | high << 4, (n, k // 8))
    )


def _repeated(drawn: Tensor, shape: Sequence[int]) -> Tensor:
    count = int(torch.Size(shape).numel())
    return drawn.repeat(-(-count // len(drawn)))[:count].view(*shape)


def _baseline(layer: nn.Module, rows: int) -> str:
    if isinstance(layer, StreamedLinear) and rows <= StreamedLinear.MOST_ROWS:
        return "halve's dense kernel, the weight is read once"
    weight = layer.weight
    if isinstance(weight, Tensor) and is_emulated(weight.dtype, weight.device):
        return "torch's float32 product, the weight is widened"
    return "torch's product"


def last_cache_bytes(device: torch.device) -> int:
    """Of the last-level cache that all of the device shares."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = []
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        try:
            text = (index / "size").read_text().strip()
        except OSError:
            continue
        number, unit = text[:-1], text[-1:]
        if number.isdigit() and unit in "KM":
            sizes.append(int(number) << (10 if unit == "K" else 20))
    return max(sizes, default=_UNKNOWN_CACHE)
