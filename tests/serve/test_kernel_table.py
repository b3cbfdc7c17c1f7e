"""The table of sparse against dense by layer shape, and the file that it is kept in."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.packed import unpack, validate
from serve.kernels import dispatch
from serve.kernels.cpu import library
from serve.linear import Sparse24Conv1D, Sparse24Linear, StreamedLinear
from serve.measure import kernel_table, table_cache, timers
from serve.measure.kernel_entries import Entry, Failure, Measured, Shape, Spread, wins_at
from serve.measure.kernel_table import measure
from serve.measure.table_cache import Identity
from tests.runs import Halve

CPU = torch.device("cpu")
SMALL = Shape(64, 128)

needs_kernels = pytest.mark.skipif(library.load() is None, reason="the CPU kernels are not built")


@pytest.fixture(autouse=True)
def _small_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A table of the test's own, and weights of a few copies."""
    monkeypatch.setenv("HALVE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(kernel_table, "last_cache_bytes", lambda device: 1 << 16)


def entry(rows: int = 1, median: float = 1.5, shape: Shape = SMALL, **changes: Any) -> Entry:
    fields: dict[str, Any] = {
        "n": shape.n, "k": shape.k, "conv1d": shape.conv1d, "dtype": "bfloat16", "rows": rows,
        "ratio": Spread(median=median, p25=median * 0.99, p75=median * 1.01),
        "sparse_seconds": 1e-3, "dense_seconds": 1e-3 * median, "backend": "cpu", "reason": "because",
        "baseline": "torch's product", "rounds": 5, "date": "2026-01-01",
    }  # fmt: skip
    return Entry(**{**fields, **changes})


def identity(**changes: Any) -> Identity:
    fields = {
        "device": "A Processor (x86_64)", "threads": 2, "kernels": "avx2 1234", "backend": "auto", "halve": "1", "torch": "2",
    }  # fmt: skip
    return Identity(**{**fields, **changes})


def test_measures_every_shape_and_row_count_that_is_asked_for() -> None:
    wanted = [(shape, rows) for shape in (SMALL, Shape(32, 64, conv1d=True)) for rows in (1, 40)]
    measured = measure(wanted, dtype=torch.bfloat16, device=CPU, budget=60)
    assert [(e.shape, e.rows) for e in measured.entries] == wanted
    assert not measured.skipped
    assert not measured.failures
    for found in measured.entries:
        assert found.ratio.p25 <= found.ratio.median <= found.ratio.p75
        assert found.rounds >= 5
        assert found.reason


def test_the_ratio_is_dense_over_sparse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sides that take known times are measured as such."""

    def known(sides: Any, x: torch.Tensor) -> dict[str, Any]:
        return {name: lambda name=name: 0.006 if name == "dense" else 0.004 for name in sides}

    monkeypatch.setattr(timers, "call_timers", known)
    [found] = measure([(SMALL, 1)], dtype=torch.bfloat16, device=CPU, budget=60).entries
    assert found.ratio.median == pytest.approx(1.5)
    assert (found.dense_seconds, found.sparse_seconds) == (0.006, 0.004)
    assert found.wins


def test_what_there_is_no_time_for_is_named() -> None:
    wanted = [(SMALL, 1), (SMALL, 2), (Shape(32, 64), 1)]
    assert measure(wanted, dtype=torch.float32, device=CPU, budget=0) == Measured([], wanted, [], [])


@needs_kernels
def test_every_backend_that_can_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each on layers of its own, all in turn."""
    other = replace(dispatch.CPU, name="triton", reason=lambda dtype, rows: f"as well, {rows} rows")
    monkeypatch.setattr(dispatch, "BACKENDS", (dispatch.CPU, other, dispatch.PLAIN))
    seen: dict[str, set[str]] = {}

    def known(sides: dict[str, list[Any]], x: torch.Tensor) -> dict[str, Any]:
        packed = {name: {layer._backend.name for layer in copies} for name, copies in sides.items() if name != "dense"}
        seen.update(packed)
        return {name: lambda name=name: {"dense": 6.0, "cpu": 4.0, "triton": 3.0}[name] for name in sides}

    monkeypatch.setattr(timers, "call_timers", known)
    wanted = [(SMALL, 1), (SMALL, 8)]
    entries = measure(wanted, dtype=torch.bfloat16, device=CPU, budget=60).entries
    assert [(e.rows, e.backend, e.ratio.median) for e in entries] == [
        (1, "cpu", 1.5), (1, "triton", 2.0), (8, "cpu", 1.5), (8, "triton", 2.0),
    ]  # fmt: skip
    assert entries[3].reason == "as well, 8 rows"
    assert seen == {"cpu": {"cpu"}, "triton": {"triton"}}
    monkeypatch.setenv("HALVE_BACKEND", "triton")
    [found] = measure([(SMALL, 1)], dtype=torch.bfloat16, device=CPU, budget=60).entries
    assert found.backend == "triton"
    assert "HALVE_BACKEND asks for it" in found.reason


@needs_kernels
def test_a_backend_that_fails_is_left_out(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The first is needed, another is not."""
    monkeypatch.setattr(dispatch, "BACKENDS", (dispatch.CPU, replace(dispatch.CPU, name="triton"), dispatch.PLAIN))
    fails, made = "triton", timers.call_timers

    def known(sides: dict[str, list[Any]], x: torch.Tensor) -> dict[str, Any]:
        if fails in sides:
            raise Exception("out of resource: shared memory\nand more")  # as Triton's own
        return made(sides, x)

    monkeypatch.setattr(timers, "call_timers", known)
    found = measure([(SMALL, 1), (SMALL, 2)], dtype=torch.bfloat16, device=CPU, budget=60)
    assert [(e.rows, e.backend) for e in found.entries] == [(1, "cpu"), (2, "cpu")]
    [failure] = found.failures
    assert (failure.shape, failure.dtype, failure.backend) == (SMALL, "bfloat16", "triton")
    assert failure.reason == "at 1 rows: out of resource: shared memory and more"
    [said] = [record.getMessage() for record in caplog.records]
    assert said == "triton does not serve 64 x 128, it fails at 1 rows: out of resource: shared memory and more"
    caplog.clear()
    measure([(SMALL, 1)], dtype=torch.bfloat16, device=CPU, budget=60, leave_out={(SMALL, "triton")})
    assert not caplog.records

    def full(sides: dict[str, list[Any]], x: torch.Tensor) -> dict[str, Any]:
        if fails in sides and len(x) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return made(sides, x)

    monkeypatch.setattr(timers, "call_timers", full)  # which passes, so it is not kept
    found = measure([(SMALL, 1), (SMALL, 2)], dtype=torch.bfloat16, device=CPU, budget=60)
    assert [(e.rows, e.backend) for e in found.entries] == [(1, "cpu"), (1, "triton"), (2, "cpu")]
    assert not found.failures
    monkeypatch.setattr(timers, "call_timers", known)
    fails = "cpu"
    with pytest.raises(Exception, match="out of resource"):
        measure([(SMALL, 1)], dtype=torch.bfloat16, device=CPU, budget=60)


@needs_kernels
def test_the_layers_are_those_that_the_engine_runs() -> None:
    sides = kernel_table._Sides(SMALL, torch.bfloat16, torch.bfloat16, CPU)
    dense, sparse = sides.sides["dense"], sides.sides["cpu"]
    assert len(dense) == len(sparse) == sides.copies == -(-2 * (1 << 16) // (64 * 128 * 3))
    assert all(isinstance(layer, Sparse24Linear) and layer.weight_prepared is not None for layer in sparse)
    assert len({layer.weight_prepared.data_ptr() for layer in sparse}) == sides.copies  # pyright: ignore
    kind = StreamedLinear if kernel_table._baseline(dense[0], 1).startswith("halve") else torch.nn.Linear
    assert all(isinstance(layer, kind) for layer in dense)
    conv1d = kernel_table._Sides(Shape(32, 64, True), torch.bfloat16, torch.bfloat16, CPU)
    assert isinstance(conv1d.sides["cpu"][0], Sparse24Conv1D)


def test_on_a_gpu_copies_of_the_smaller_form_fill_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """A side's replay goes through its own copies alone."""
    monkeypatch.setattr(kernel_table, "last_cache_bytes", lambda device: 60 << 20)
    for shape in (Shape(4096, 4096), Shape(1024, 4096), Shape(57344, 8192)):
        for values, packed in (
            (torch.bfloat16, shape.n * shape.k * 2 * 9 // 16),
            (torch.int8, shape.n * shape.k * 2 * 5 // 16 + 4 * shape.n),
        ):
            found = kernel_table.copies(shape, torch.bfloat16, values, torch.device("cuda"))
            assert found * packed >= 2 * (60 << 20)
            assert found == 2 or (found - 1) * packed < 2 * (60 << 20)


def test_replays_that_are_measured_stand_behind_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """And each has some launches, whose mean counts."""
    said: list[str] = []

    class Event:
        def __init__(self, **how: Any) -> None:
            pass

        def record(self) -> None:
            said.append("record")

        def synchronize(self) -> None:
            said.append("wait")

        def elapsed_time(self, other: Any) -> float:
            return 32.0  # milliseconds

    class Graph:
        def replay(self) -> None:
            said.append("replay")

    class Stream:
        def wait_stream(self, other: Any) -> None:
            pass

    for name, fake in (("Event", Event), ("CUDAGraph", Graph), ("Stream", Stream), ("current_stream", Stream)):
        monkeypatch.setattr(torch.cuda, name, fake)
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda what: contextlib.nullcontext())
    calls: list[int] = []
    layers: Any = [lambda x, i=i: calls.append(i) for i in range(3)]
    timer = timers.graph_timers({"dense": layers}, torch.zeros(1))["dense"]
    assert calls == [0, 1, *[0, 1, 2] * 6]  # two to warm up, then 16 and more
    said.clear()
    assert timer() == pytest.approx(0.032 / 18)
    assert said == ["replay", "record", "replay", "record", "wait"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_random_weights_are_two_of_four_and_finite(dtype: torch.dtype) -> None:
    weight = kernel_table.random_packed_weight(48, 72, dtype)
    validate(weight, "random")
    kept = (unpack(weight) != 0).view(48, -1, 4).sum(-1)
    assert (kept == 2).all()
    assert len(torch.unique(unpack(weight), dim=0)) == 48  # no two rows are alike


def test_where_it_wins_in_words() -> None:
    assert wins_at([entry(rows, 0.9) for rows in (1, 2)]) == "never"
    assert wins_at([entry(rows, 1.5) for rows in (1, 2, 64)]) == "always (1 to 64)"
    assert wins_at([entry(r, m) for r, m in ((1, 1.6), (64, 1.2), (256, 0.9), (1024, 0.8))]) == "1 to 64"
    assert wins_at([entry(r, m) for r, m in ((256, 1.2), (1, 0.9), (64, 0.8))]) == "256"
    assert wins_at([entry(r, m) for r, m in ((1, 1.2), (2, 1.02), (4, 1.2))]) == "1, 4"
    noisy = entry(1, 1.2, ratio=Spread(median=1.2, p25=0.9, p75=1.4))
    assert not noisy.wins


def test_a_table_is_kept_and_found_again() -> None:
    me = identity()
    assert table_cache.load(me) == ([], None)
    assert table_cache.save(me, [entry(1), entry(2)]) is None
    assert table_cache.save(me, [entry(2, 3.0), entry(4, dtype="float16")]) is None
    kept, why = table_cache.load(me)
    assert why is None
    assert {(e.rows, e.dtype, e.ratio.median) for e in kept} == {
        (1, "bfloat16", 1.5),
        (2, "bfloat16", 3.0),
        (4, "float16", 1.5),
    }
    assert table_cache.find(kept, SMALL, 4, "bfloat16") == []
    assert [found.ratio.median for found in table_cache.find(kept, SMALL, 2, "bfloat16")] == [3.0]
    table_cache.save(me, [entry(2, 2.0, backend="triton")])
    found = table_cache.find(table_cache.load(me)[0], SMALL, 2, "bfloat16")
    assert [(e.backend, e.ratio.median) for e in found] == [("cpu", 3.0), ("triton", 2.0)]
    assert not list(table_cache.path_of(me).parent.glob("*.partial"))


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: b"",
        lambda content: b"\xff\xfe\x00",
        lambda content: b"[" * 100_000,
        lambda content: b"[]",
        lambda content: content.replace(b'"median": 1.5', b'"median": 9.5'),
        lambda content: content.replace(b'"format": 1', b'"format": 2'),
    ],
)
def test_a_damaged_table_is_not_used(damage: Any) -> None:
    me = identity()
    table_cache.save(me, [entry()])
    path = table_cache.path_of(me)
    path.write_bytes(damage(path.read_bytes()))
    kept, why = table_cache.load(me)
    assert kept == []
    assert why is not None
    assert "damaged" in why
    assert str(path) in why
    table_cache.save(me, [entry()])
    assert table_cache.load(me)[1] is None


def test_wrong_values_with_a_right_digest_are_damage_too() -> None:
    me = identity()
    table_cache.save(me, [entry()])
    path = table_cache.path_of(me)
    table = json.loads(path.read_bytes())["table"]
    table["entries"][0]["ratio"]["median"] = -1.0
    path.write_text(json.dumps({"sha256": table_cache._digest(table), "table": table}))
    assert "damaged" in (table_cache.load(me)[1] or "")


def failure(shape: Shape = SMALL, backend: str = "triton") -> Failure:
    return Failure(**asdict(shape), dtype="bfloat16", backend=backend, reason="at 64 rows: no", date="2026-01-01")


def test_what_failed_has_no_entries_until_it_is_measured_again() -> None:
    me = identity()
    table_cache.save(me, [entry(1, backend="triton"), entry(1, backend="triton", shape=Shape(32, 64)), entry(1)])
    table_cache.save(me, [entry(2)], [failure()])
    kept = {(e.shape, e.rows, e.backend) for e in table_cache.load(me)[0]}
    assert kept == {(SMALL, 1, "cpu"), (SMALL, 2, "cpu"), (Shape(32, 64), 1, "triton")}
    assert table_cache.failures(me) == [failure()]
    table_cache.save(me, [entry(4)], [failure(), failure(Shape(8, 8))])
    assert table_cache.failures(me) == [failure(), failure(Shape(8, 8))]
    table_cache.save(me, [entry(1, backend="triton")])
    assert table_cache.failures(me) == [failure(Shape(8, 8))]


@pytest.mark.parametrize("field", ["kernels", "halve", "torch"])
def test_a_table_of_other_versions_is_out_of_date(field: str) -> None:
    table_cache.save(identity(), [entry()])
    kept, why = table_cache.load(identity(**{field: "avx2 other"}))
    assert kept == []
    assert why is not None
    assert "out of date" in why
    assert f"{field} was" in why


@pytest.mark.parametrize(
    "other", [{"many_rows": "cusparselt-kept"}, {"backend": "plain"}, {"kernels": "portable 1234"}, {"threads": 1}]
)
def test_what_is_asked_for_has_a_table_of_its_own(other: dict[str, Any]) -> None:
    table_cache.save(identity(), [entry(1, 1.5)])
    assert table_cache.load(identity(**other)) == ([], None)
    table_cache.save(identity(**other), [entry(1, 2.5)])
    for way, ratio in (({}, 1.5), (other, 2.5)):
        [kept] = table_cache.load(identity(**way))[0]
        assert kept.ratio.median == ratio


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HALVE_CACHE_DIR", str(tmp_path / "file"))
    assert "not kept" in (table_cache.save(identity(), [entry()]) or "")
    assert table_cache.load(identity())[0] == []


def test_bench_kernels(halve: Halve, tmp_path: Path) -> None:
    from tests import tiny_models

    model = tiny_models.build("gpt2", tmp_path / "model", layers=1)
    called = halve("bench", str(model), "--kernels", "--budget", "30", "--json")
    assert called.code == 0, called.stderr
    document = json.loads(called.stdout.splitlines()[-1])
    assert document["kind"] == "kernels"
    shapes = {(layer["n"], layer["k"]) for layer in document["layers"]}
    assert {(e["n"], e["k"]) for e in document["kernels"]} == shapes == {(192, 64), (64, 64), (160, 64), (64, 160)}
    assert {e["rows"] for e in document["kernels"]} == set(kernel_table.ROWS)
    assert all(e["conv1d"] for e in document["kernels"])
    kept, _ = table_cache.load(Identity.of(CPU))
    assert len(kept) == len(document["kernels"])
    shown = halve("bench", str(model), "--kernels", "--budget", "1")
    assert shown.code == 0
    assert "2:4 is faster at rows" in shown.stdout


@pytest.mark.gpu
def test_measures_on_a_gpu() -> None:
    entries, skipped = measure([(Shape(4096, 4096), 1)], dtype=torch.bfloat16, device=torch.device("cuda"), budget=60)
    assert not skipped
    bandwidth = 4096 * 4096 * 2 / entries[0].dense_seconds
    assert 5e10 < bandwidth < 2e13  # from memory: no GPU is slower or faster
