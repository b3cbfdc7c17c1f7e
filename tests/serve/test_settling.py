"""Which of a backend's ways is taken: the fastest that works, by more than noise, in time; and by whom."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from serve.kernels import dispatch, ways
from serve.kernels.cpu import library
from serve.linear import prepare_for_serving
from serve.measure import kernel_table, model_kernels, settling, shapes, table_cache, timers, tuned
from serve.measure.kernel_entries import Shape
from serve.measure.settling import Product, settle
from serve.measure.table_cache import Identity
from tests import tiny_models

needs_kernels = pytest.mark.skipif(library.load() is None, reason="the CPU kernels are not built")
CPU = torch.device("cpu")
PRODUCT = Product(CPU, torch.bfloat16, torch.bfloat16, 64, 128)
NAMES = ("guess", "second", "third")


def names(device: torch.device, values: torch.dtype, dtype: torch.dtype, rows: int, n: int, k: int) -> list[str]:
    return list(NAMES)


BACKEND = replace(dispatch.PLAIN, name="made up", choices=ways.Choices((8, 16), names))


class Layers:
    """What is timed: each way takes its time, by a clock that no other work slows down."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float], backend: str = "made up") -> None:
        self.now, self.calls, self.seconds, self.backend = 0.0, [], seconds, backend
        self.ways = ways.of(backend, None, torch.bfloat16, torch.bfloat16)
        self.drift = 0.0
        monkeypatch.setattr(timers.time, "perf_counter", lambda: self.now)

    def __call__(self, x: Tensor) -> None:
        rows, k = x.shape
        way = self.ways.find(rows, 64, k)
        assert way is not None
        self.calls.append((rows, way))
        if math.isnan(self.seconds[way]):
            raise RuntimeError("out of resources\nand more")
        self.drift += 0.004
        self.now += self.seconds[way] * (1 + self.drift)


@pytest.fixture(autouse=True)
def _nothing_taken() -> Iterator[None]:
    ways.of.cache_clear()
    yield
    ways.of.cache_clear()


def settled(
    monkeypatch: pytest.MonkeyPatch, seconds: tuple[float, float, float], deadline: float = math.inf
) -> tuple[list[settling.Settled], Layers]:
    layers = Layers(monkeypatch, dict(zip(NAMES, seconds, strict=True)))
    return settle(BACKEND, PRODUCT, [layers, layers], (8, 16), deadline), layers


@pytest.mark.parametrize(
    ("seconds", "best", "gain"),
    [
        ((2.0, 1.0, 1.5), "second", 2.0),
        ((2.0, 1.5, 1.0), "third", 2.0),
        ((1.0, 1.1, 1.2), "guess", 1.0),
        ((1.0, 0.99, 0.985), "guess", 1.0),  # within noise
        ((1.0, 0.95, math.nan), "second", 1 / 0.95),
        ((5.0, math.nan, 1.0), "third", 5.0),
    ],
)
def test_the_fastest_is_taken(
    monkeypatch: pytest.MonkeyPatch, seconds: tuple[float, float, float], best: str, gain: float
) -> None:
    """Though the machine grows slower all the time."""
    found, layers = settled(monkeypatch, seconds)
    assert [(one.rows, one.way) for one in found] == [(8, best), (16, best)]
    assert [one.gain for one in found] == pytest.approx([gain] * 2, rel=0.02)
    assert [layers.ways.find(rows, 64, 128) for rows in (8, 16, 32)] == [best, best, None]


def test_slow_ways_are_not_timed_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    _, layers = settled(monkeypatch, (1.0, 1.05, 3.0))
    count = {name: layers.calls.count((8, name)) for name in NAMES}
    assert count["third"] < count["guess"] == count["second"]


def test_without_a_guess_that_works_nothing_changes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ways.of("made up", None, torch.bfloat16, torch.bfloat16).take(8, 64, 128, "third")
    with caplog.at_level(logging.INFO, logger="halve.serve"):
        found, layers = settled(monkeypatch, (math.nan, 1.0, 1.0))
    assert found == []
    assert [layers.ways.find(rows, 64, 128) for rows in (8, 16)] == ["third", None]
    assert [record.getMessage() for record in caplog.records] == [
        f"guess does not multiply {rows} rows: out of resources and more" for rows in (8, 16)
    ]


@pytest.mark.parametrize("calls", [0, 1, 2, 5, 12])
def test_what_there_is_no_time_for_stays(monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    """However far the measurement was."""
    ways.of("made up", None, torch.bfloat16, torch.bfloat16).take(8, 64, 128, "third")
    layers = Layers(monkeypatch, dict(zip(NAMES, (2.0, 1.0, 1.5), strict=True)))
    monkeypatch.setattr(settling.time, "monotonic", lambda: len(layers.calls))
    assert settle(BACKEND, PRODUCT, [layers, layers], (8, 16), calls) == []
    assert [layers.ways.find(rows, 64, 128) for rows in (8, 16)] == ["third", None]


def test_a_single_way_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    for found in (["guess"], []):
        only = replace(BACKEND, choices=ways.Choices((8,), lambda *product, found=found: found))
        layers = Layers(monkeypatch, {"guess": 1.0})
        assert settle(only, PRODUCT, [layers], (8,), math.inf) == [settling.Settled(8, way, 1.0) for way in found]
        assert layers.calls == []


def test_what_was_made_is_forgotten() -> None:
    found = ways.of("made up", 0, torch.int8, torch.float16)
    assert ways.of("made up", 0, torch.int8, torch.float16) is found
    assert ways.of("made up", 1, torch.int8, torch.float16) is not found
    found.made["launch"] = 1
    found.take(8, 64, 128, "second")
    assert not found.made
    assert (found.find(8, 64, 128), found.find(16, 64, 128), found.find(8, 128, 64)) == ("second", None, None)
    found.take(8, 64, 128, None)
    found.take(8, 64, 128, None)
    assert found.find(8, 64, 128) is None


@needs_kernels
class TestTables:
    """A backend with ways of its own, which is the processor's, and takes the time that a way is said to take."""

    @pytest.fixture(autouse=True)
    def _backend(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("HALVE_CACHE_DIR", str(tmp_path / "cache"))
        monkeypatch.delenv("HALVE_BACKEND", raising=False)
        monkeypatch.setattr(kernel_table, "last_cache_bytes", lambda device: 1 << 14)
        monkeypatch.setattr(kernel_table, "_SECONDS", 0.0)
        monkeypatch.setattr(model_kernels, "ROWS", (1, 8))
        self.seconds = {"guess": 2.0, "second": 1.0, "third": 4.0}
        self.asked: list[tuple[int, int, int]] = []
        monkeypatch.setattr(timers, "call_timers", self._timers)

        def ask(device: torch.device, values: torch.dtype, dtype: torch.dtype, rows: int, n: int, k: int) -> list[str]:
            assert (device, values, dtype) == (CPU, torch.bfloat16, torch.bfloat16)
            self.asked.append((rows, n, k))
            return list(NAMES)

        with_ways = replace(dispatch.CPU, choices=ways.Choices((8, 16), ask))
        monkeypatch.setattr(dispatch, "BACKENDS", (with_ways, dispatch.PLAIN))

    def _timers(self, sides: dict[str, Any], x: Tensor) -> dict[str, Any]:
        found = ways.of("cpu", None, torch.bfloat16, torch.bfloat16)

        def seconds(name: str) -> float:
            layer = sides[name][0]
            n = getattr(layer, "out_features", None) or layer.weight.shape[0]
            rows = 8 if len(x) <= 8 else 16
            return 3.0 if name == "dense" else self.seconds[found.find(rows, n, x.shape[1]) or "guess"]

        return {name: lambda name=name: seconds(name) for name in sides}

    def test_they_are_measured_before_the_shapes_and_kept(self, tmp_path: Path) -> None:
        model = shapes.read(str(tiny_models.build("llama", tmp_path / "model", layers=1)))
        entries, said = model_kernels.kernels(model, device=CPU, budget=60, fresh=False)
        all_shapes = model_kernels.shapes_of(model)
        assert {entry.ratio.median for entry in entries} == {3.0}, "they are times of the way that was found"
        wanted = {(shape, rows) for shape in all_shapes for rows in (8, 16)}
        kept = table_cache.ways(Identity.of(CPU))
        assert {(way.shape, way.rows) for way in kept} == wanted
        assert {(way.backend, way.dtype, way.way, way.gain) for way in kept} == {("cpu", "bfloat16", "second", 2.0)}
        count = len(wanted)
        assert (
            f"{count} of {count} products are cut another way than was guessed, which is up to 2.00 times as fast"
            in said
        )

        ways.of.cache_clear()  # another process
        self.asked.clear()
        again, said_again = model_kernels.kernels(model, device=CPU, budget=60, fresh=False)
        assert again == entries
        assert self.asked == []
        assert said[0] in said_again
        found = ways.of("cpu", None, torch.bfloat16, torch.bfloat16)
        assert {found.find(rows, shape.n, shape.k) for shape, rows in wanted} == {"second"}

    def test_more_rows_are_measured_the_way_that_is_known(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = shapes.read(str(tiny_models.build("llama", tmp_path / "model", layers=1)))
        model_kernels.kernels(model, device=CPU, budget=60, fresh=False)
        monkeypatch.setattr(model_kernels, "ROWS", (1, 8, 2))
        ways.of.cache_clear()
        self.asked.clear()
        entries, _ = model_kernels.kernels(model, device=CPU, budget=60, fresh=False)
        assert self.asked == []
        assert {entry.ratio.median for entry in entries if entry.rows == 2} == {3.0}

        self.seconds["second"] = 8.0
        entries, said = model_kernels.kernels(model, device=CPU, budget=60, fresh=True)
        assert {entry.ratio.median for entry in entries} == {1.5}, "measured anew"
        assert {way.way for way in table_cache.ways(Identity.of(CPU))} == {"guess"}
        assert not any("cut another way" in line for line in said)

    @pytest.mark.parametrize("wish", [None, "cpu"])
    def test_whoever_loads_a_model_takes_them(self, monkeypatch: pytest.MonkeyPatch, wish: str | None) -> None:
        """Also where a backend is asked for by name: its ways are its own affair."""
        if wish is not None:
            monkeypatch.setenv("HALVE_BACKEND", wish)
        shape = Shape(64, 128)
        found = kernel_table.measure([(shape, 1)], dtype=torch.bfloat16, device=CPU, budget=60)
        assert table_cache.save(Identity.of(CPU), found.entries, ways=found.ways) is None
        ways.of.cache_clear()
        layer = kernel_table.random_packed(nn.Linear(128, 64, bias=False), torch.bfloat16, CPU)
        layers = nn.ModuleList([layer])
        tuned.serve_as_measured(layers)
        prepare_for_serving(layers)
        taken = ways.of("cpu", None, torch.bfloat16, torch.bfloat16)
        assert [taken.find(rows, 64, 128) for rows in (8, 16)] == ["second", "second"]

    def test_a_third_of_the_time_is_theirs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        deadlines: list[float] = []
        monkeypatch.setattr(settling, "settle", lambda *given: (deadlines.append(given[-1]), [])[1])
        began = time.monotonic()
        found = kernel_table.measure([(Shape(64, 128), 1)], dtype=torch.bfloat16, device=CPU, budget=90)
        assert began + 29 < deadlines[0] < began + 40
        assert not found.ways
        assert found.entries
