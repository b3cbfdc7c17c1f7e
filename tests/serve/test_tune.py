"""Layers that 2:4 makes slower are served dense: when, which, with the same results, and never without a measurement."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from compress.packed import unpack
from serve import server
from serve.engines import vllm
from serve.kernels import dispatch
from serve.linear import Sparse24Conv1D, Sparse24Linear, backends, prepare_for_serving
from serve.loading import load_model
from serve.measure import first_load, kernel_entries, kernel_table, model_kernels, shapes, table_cache, tuned
from serve.measure.first_load import measure_unknown
from serve.measure.kernel_entries import Entry, Measured, Shape, Spread
from serve.measure.kernel_table import ROWS, random_packed
from serve.measure.shapes import Layers
from serve.measure.table_cache import Identity
from tests import tiny_models
from tests.runs import Halve, compress

CPU = torch.device("cpu")
DOWN = Shape(tiny_models.HIDDEN, tiny_models.INTERMEDIATE)


@pytest.fixture(autouse=True)
def _own_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HALVE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("HALVE_BACKEND", raising=False)
    monkeypatch.setattr(kernel_table, "last_cache_bytes", lambda device: 1 << 16)
    monkeypatch.setattr(kernel_table, "_SECONDS", 0.01)


def entry(
    rows: int, median: float, shape: Shape = DOWN, dtype: str = "bfloat16", spread: float = 0.01, backend: str = "cpu"
) -> Entry:
    return Entry(
        n=shape.n, k=shape.k, conv1d=shape.conv1d, dtype=dtype, rows=rows,
        ratio=Spread(median=median, p25=median * (1 - spread), p75=median * (1 + spread)),
        sparse_seconds=1e-3 / median, dense_seconds=1e-3, backend=backend, reason="because",
        baseline="torch's product", rounds=5, date="2026-01-01",
    )  # fmt: skip


def keep(*ratios: float, rows: tuple[int, ...] = ROWS, **more: Any) -> None:
    """A table of this machine with those ratios, the last one for all rows that are left."""
    filled = [*ratios, *[ratios[-1]] * len(rows)][: len(rows)]
    problem = table_cache.save(
        Identity.of(CPU), [entry(r, ratio, **more) for r, ratio in zip(rows, filled, strict=True)]
    )
    assert problem is None


@pytest.mark.parametrize(
    ("ratios", "loses"),
    [
        ({1: 0.8, 16: 0.9, 64: 0.7}, True),
        ({1: 0.8}, True),
        ({1: 0.8, 16: 0.9, 1024: 1.5}, True),  # (prompts come once an answer)
        ({1: 0.8, 16: 1.1, 64: 0.7}, False),
        ({1: 0.8, 16: 0.99, 64: 0.7}, False),  # within noise: the memory that is saved is sure
        ({16: 0.8, 64: 0.7}, False),  # a single row was not measured
        ({1: 1.4}, False),
        ({}, False),
    ],
)
def test_a_shape_loses_where_dense_wins_at_all_rows_of_decoding(ratios: dict[int, float], loses: bool) -> None:
    reason = tuned.loses([entry(rows, median) for rows, median in ratios.items()])
    assert (reason is not None) == loses
    if reason is not None:
        assert "dense is faster" in reason
        assert f"{min(ratios[rows] for rows in ratios if rows <= 64):.2f}" in reason


def test_ratios_that_scatter_across_one_decide_nothing() -> None:
    assert tuned.loses([entry(1, 0.9, spread=0.2)]) is None
    assert tuned.loses([entry(1, 0.9, spread=0.05)]) is not None


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 40)[None]).logits


def packed_names(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, Sparse24Linear)}


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_loaded_model_has_the_slow_shapes_dense_and_gives_the_same(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = tiny_models.build(family, tmp_path / "source", layers=2)
    directory = compress(source, tmp_path / "out").directory
    before = load_model(directory)
    shape = Shape(tiny_models.HIDDEN, tiny_models.INTERMEDIATE, family == "gpt2")
    slow = {
        name
        for name, module in before.named_modules()
        if isinstance(module, Sparse24Linear) and (module.out_features, module.in_features) == (shape.n, shape.k)
    }
    assert len(slow) == 2
    keep(0.8, shape=shape)
    with caplog.at_level(logging.WARNING, logger="halve.serve"):
        after = load_model(directory)
    assert packed_names(before) - packed_names(after) == slow
    for name in slow:
        module, was = after.get_submodule(name), before.get_submodule(name)
        assert isinstance(module, Conv1D if family == "gpt2" else nn.Linear)
        assert isinstance(was, Sparse24Linear)
        weight = unpack(was.packed)
        assert torch.equal(module.weight, weight.T if family == "gpt2" else weight)
        assert not module.weight.requires_grad
    torch.testing.assert_close(logits(after), logits(before), rtol=0.05, atol=0.05)
    (record,) = caplog.records
    assert "2 of" in record.getMessage()
    assert "dense is faster here at 1 to 64 rows" in record.getMessage()


def test_another_dtype_shape_machine_or_wish_decides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = compress(tiny_models.build("llama", tmp_path / "source", layers=1), tmp_path / "out").directory
    every = packed_names(load_model(directory))
    keep(0.8, dtype="float16")
    keep(0.8, shape=Shape(DOWN.n, DOWN.k, conv1d=True))
    keep(0.8, shape=Shape(DOWN.k, DOWN.n + 8))
    assert packed_names(load_model(directory)) == every
    keep(0.8)
    assert packed_names(load_model(directory)) < every
    monkeypatch.setenv("HALVE_BACKEND", "plain")
    assert packed_names(load_model(directory)) == every
    monkeypatch.delenv("HALVE_BACKEND")
    mine = Identity.of(CPU)
    monkeypatch.setattr(Identity, "of", classmethod(lambda cls, device: mine.model_copy(update={"torch": "0.0"})))
    assert packed_names(load_model(directory)) == every


def test_a_layer_that_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """As vLLM's layers are; the table is read once."""
    keep(0.8)
    tuned._decisions_once.cache_clear()
    try:
        found = tuned.decision(CPU, torch.bfloat16, DOWN.n, DOWN.k)
        assert found is not None
        assert "dense is faster" in (found.why_dense or "")
        assert tuned.decision(CPU, torch.float16, DOWN.n, DOWN.k) is None
        assert tuned.decision(CPU, torch.bfloat16, DOWN.k, DOWN.n) is None
        monkeypatch.setattr(table_cache, "load", lambda identity: pytest.fail("read again"))
        assert tuned.decision(CPU, torch.bfloat16, DOWN.n, DOWN.k) == found
    finally:
        tuned._decisions_once.cache_clear()


class TestBackends:
    """Where several can run a layer, the fastest does."""

    @pytest.fixture(autouse=True)
    def _two(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of which the first is taken where nothing was measured."""
        second = replace(dispatch.CPU, name="triton")
        monkeypatch.setattr(dispatch, "BACKENDS", (dispatch.CPU, second, dispatch.PLAIN))
        if dispatch.CPU.why_not(CPU, torch.bfloat16) is not None:
            pytest.skip("the CPU kernels are not built")

    @pytest.mark.parametrize(
        ("first", "second", "best"),
        [
            ({1: 1.2, 64: 1.0}, {1: 1.5, 64: 1.3}, "triton"),
            ({1: 1.2, 64: 1.0}, {1: 1.22, 64: 1.01}, "cpu"),  # within noise
            ({1: 1.5, 64: 1.0}, {1: 1.0, 64: 1.5}, "cpu"),
            ({1: 1.5, 64: 1.0}, {1: 1.2, 64: 1.6}, "triton"),
            ({1: 1.5, 1024: 1.0}, {1: 1.2, 1024: 9.0}, "cpu"),  # prompts do not count
            ({1: 1.5, 64: 0.5}, {1: 1.6}, "triton"),  # only what both were measured at
            ({1: 1.5}, {64: 1.6}, "cpu"),
            ({}, {1: 0.9}, "triton"),
            ({1: 1.1, 64: 0.4}, {1: 0.95, 64: 0.9}, "cpu"),  # where 2:4 gains at all
            ({1: 0.95, 64: 0.9}, {1: 1.1, 64: 0.4}, "triton"),
        ],
    )
    def test_the_fastest(self, first: dict[int, float], second: dict[int, float], best: str) -> None:
        entries = [entry(rows, ratio, backend="triton") for rows, ratio in second.items()]
        entries += [entry(rows, ratio, backend="cpu") for rows, ratio in first.items()]
        entries.append(entry(1, 9.0, backend="cuda"))  # which cannot run here
        found, _ = tuned.served(entries, ["cpu", "triton"])
        assert {e.backend for e in found} == {best}
        assert {e.rows: e.ratio.median for e in found} == (second if best == "triton" else first)
        assert tuned.served(entries[-1:], ["cpu", "triton"]) == ([], None)

    def test_a_layer_is_prepared_for_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def prepared() -> Sparse24Linear:
            layers = nn.ModuleList([random_packed(nn.Linear(DOWN.k, DOWN.n, bias=False), torch.bfloat16, CPU)])
            tuned.serve_as_measured(layers)
            prepare_for_serving(layers)
            [layer] = layers
            assert isinstance(layer, Sparse24Linear)
            assert layer._backend is not None
            assert [told["backend"] for told in backends(layers, {"decode": 1})] == [layer._backend.name]
            return layer

        assert prepared()._backend.name == "cpu"  # pyright: ignore[reportOptionalMemberAccess]
        keep(1.2)
        keep(1.5, backend="triton")
        layer = prepared()
        assert layer._backend.name == "triton"  # pyright: ignore[reportOptionalMemberAccess]
        assert "not cpu: measured to be slower here" in backends(layer, {"decode": 1})[0]["reason"]
        monkeypatch.setenv("HALVE_BACKEND", "cpu")
        assert prepared()._backend.name == "cpu"  # pyright: ignore[reportOptionalMemberAccess]

    def test_a_model_that_was_prepared_while_it_was_loaded(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """transformers' loading prepares every layer before anything is known of the table."""
        directory = compress(tiny_models.build("llama", tmp_path / "source", layers=1), tmp_path / "out").directory
        before = load_model(directory)
        keep(1.2)
        keep(1.5, backend="triton")
        model = load_model(directory)
        layers = {name: module for name, module in model.named_modules() if isinstance(module, Sparse24Linear)}
        assert layers
        expected = {
            n: "triton" if (m.out_features, m.in_features) == (DOWN.n, DOWN.k) else "cpu" for n, m in layers.items()
        }
        assert {name: module.prepared_for for name, module in layers.items()} == expected
        told = {told["backend"]: told["layers"] for told in backends(model, {"decode": 1})}
        assert told == {"triton": 1, "cpu": len(layers) - 1}
        assert torch.equal(logits(model), logits(before))

    def test_one_that_fails_at_some_rows_serves_none(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        model = shapes.read(str(tiny_models.build("llama", tmp_path / "model", layers=1)))
        monkeypatch.setattr(model_kernels, "ROWS", (1, 16, 64, 256))
        forward, tried = Sparse24Linear.forward, []

        def fails(self: Sparse24Linear, x: Tensor) -> Tensor:
            if self.prepared_for == "triton":
                tried.append(len(x))
                if len(x) > 16:
                    raise RuntimeError("out of resources\nand more")
            return forward(self, x)

        monkeypatch.setattr(Sparse24Linear, "forward", fails)
        found, said = model_kernels.kernels(model, device=CPU, budget=60, fresh=False)
        assert {e.backend for e in found} == {"cpu"}
        assert {e.backend for e in table_cache.load(Identity.of(CPU))[0]} == {"cpu"}
        assert any(f"triton does not serve {DOWN}: at 64 rows: out of resources" in line for line in said)
        assert set(tried) == {1, 16, 64}

        tried.clear()
        again, said = model_kernels.kernels(model, device=CPU, budget=60, fresh=False)
        assert not tried, "it is known to fail"
        assert again == found
        assert any("triton does not serve" in line for line in said)

        monkeypatch.setattr(Sparse24Linear, "forward", forward)
        found, said = model_kernels.kernels(model, device=CPU, budget=60, fresh=True)
        assert {e.backend for e in found} == {"cpu", "triton"}
        assert not table_cache.failures(Identity.of(CPU))
        assert not any("does not serve" in line for line in said)

    def test_what_is_said_to_be_dense_is_served_dense(
        self, halve: Halve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = tiny_models.build("llama", tmp_path / "model", layers=1)

        def measure(wanted: Any, **more: Any) -> Measured:
            return Measured([entry(rows, 0.8, shape, backend=name) for shape, rows in wanted for name in measured], [])

        monkeypatch.setattr(kernel_table, "measure", measure)
        measured = ["cpu"]
        assert halve("tune", model, "--json").document["served_dense"].keys() >= {str(DOWN)}
        monkeypatch.setenv("HALVE_BACKEND", "cpu")
        document = halve("tune", model, "--json").document
        assert document["served_dense"] == {}
        assert any("HALVE_BACKEND" in note for note in document["notes"])
        monkeypatch.delenv("HALVE_BACKEND")
        assert tuned.decisions(CPU)[DOWN, "bfloat16"].why_dense, "its table is still there"
        monkeypatch.setenv("HALVE_CACHE_DIR", str(tmp_path / "another"))
        measured = ["triton"]  # and not the first
        assert halve("tune", model, "--json").document["served_dense"] == {}
        assert tuned.decisions(CPU) == {}

    def test_one_that_no_longer_runs_does_not_count(self, monkeypatch: pytest.MonkeyPatch) -> None:
        keep(0.8)
        keep(1.5, backend="triton")
        assert tuned.decisions(CPU)[DOWN, "bfloat16"] == tuned.Decision("triton", None)
        monkeypatch.setattr(dispatch, "BACKENDS", (dispatch.CPU, dispatch.PLAIN))
        assert tuned.decisions(CPU)[DOWN, "bfloat16"].why_dense is not None
        keep(1.2)
        assert tuned.decisions(CPU)[DOWN, "bfloat16"] == tuned.Decision(None, None)
        layers = nn.ModuleList([random_packed(nn.Linear(DOWN.k, DOWN.n, bias=False), torch.bfloat16, CPU)])
        tuned.serve_as_measured(layers)
        prepare_for_serving(layers)
        assert layers[0]._backend.name == "cpu"  # pyright: ignore

    def test_nothing_is_decided_before_the_first_was_measured(self) -> None:
        keep(0.8, backend="triton")
        assert tuned.decisions(CPU) == {}

    def test_dense_has_to_beat_the_fastest(self) -> None:
        keep(0.8)
        assert tuned.decisions(CPU)[DOWN, "bfloat16"].why_dense is not None
        keep(1.2, backend="triton")
        assert tuned.decisions(CPU)[DOWN, "bfloat16"] == tuned.Decision("triton", None)
        keep(0.9, backend="triton")
        found = tuned.decisions(CPU)[DOWN, "bfloat16"]
        assert "2:4 is 0.90 to 0.90 times as fast" in (found.why_dense or "")

    def test_the_command_shows_both(self, halve: Halve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        model = tiny_models.build("llama", tmp_path / "model", layers=1)

        def measure(wanted: Any, **more: Any) -> Measured:
            made = [entry(rows, ratio, shape, backend=name) for shape, rows in wanted for name, ratio in RATIOS.items()]
            return Measured(made, [])

        monkeypatch.setattr(kernel_table, "measure", measure)
        document = halve("tune", model, "--json").document
        assert {e["backend"] for e in document["kernels"]} == {"triton"}
        assert {e["backend"] for e in document["other_backends"]} == {"cpu"}
        assert len(document["other_backends"]) == len(document["kernels"])
        shown = halve("tune", model)
        assert f"{DOWN} by cpu, times as fast by rows: 1.10 at 1, 1.10 at 2" in " ".join(shown.stdout.split())

    def test_what_one_was_not_measured_at_is_missing(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        model = shapes.read(str(tiny_models.build("llama", tmp_path / "model", layers=1)))
        keep(1.2)
        keep(1.5, rows=ROWS[:2], backend="triton")
        wanted: list[tuple[Shape, int]] = []
        monkeypatch.setattr(kernel_table, "measure", lambda missing, **more: wanted.extend(missing) or Measured([], []))
        model_kernels.kernels(model, device=CPU, budget=1, fresh=False)
        assert {rows for shape, rows in wanted if shape == DOWN} == set(ROWS[2:])
        known, _ = model_kernels.kernels(model, device=CPU, budget=0, fresh=False)
        assert [(e.rows, e.backend) for e in known][:3] == [(1, "cpu"), (1, "triton"), (2, "cpu")]
        assert len(known) == len(ROWS) + 2
        assert {e.backend for e in model_kernels.served(known, CPU)[0]} == {"triton"}


RATIOS = {"cpu": 1.1, "triton": 1.4}


def test_a_module_of_modules_and_a_bias() -> None:
    keep(0.8)
    layers = nn.ModuleList(
        random_packed(nn.Linear(DOWN.k, DOWN.n, bias=bias), torch.bfloat16, CPU) for bias in (False, True)
    )
    x = torch.randn(5, DOWN.k).bfloat16()
    expected = [layer(x) for layer in layers]
    replaced = tuned.serve_as_measured(layers)
    assert set(replaced) == {"0", "1"}
    [told] = backends(layers, {"decode": 1})
    assert (told["phase"], told["backend"], told["layers"]) == ("decode", "dense", 2)
    assert "dense is faster here" in told["reason"]
    for layer, wanted in zip(layers, expected, strict=True):
        assert type(layer) is nn.Linear
        torch.testing.assert_close(layer(x), wanted, rtol=0.02, atol=0.02)
    assert not isinstance(layers[0], Sparse24Conv1D)


def test_the_command(halve: Halve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models.build("llama", tmp_path / "model", layers=1)
    first = halve("tune", model, "--budget", "30", "--json").document
    shapes = {(entry["n"], entry["k"]) for entry in first["kernels"]}
    assert (DOWN.n, DOWN.k) in shapes
    assert len(first["kernels"]) == len(shapes) * len(ROWS)
    assert Path(first["table"]).is_file()
    keep(0.8)
    measured: list[object] = []
    measure = kernel_table.measure
    monkeypatch.setattr(
        kernel_table, "measure", lambda wanted, **more: measured.extend(wanted) or measure(wanted, **more)
    )
    known = halve("tune", model, "--budget", "30", "--json").document
    assert not measured, "the table has them all"
    assert "dense is faster" in known["served_dense"][str(DOWN)]
    shown = halve("tune", model, "--budget", "30")
    assert f"{DOWN} is served dense" in shown.stdout
    halve("tune", model, "--budget", "30", "--again", "--json")
    assert len(measured) == len(first["kernels"])
    assert halve("tune", tmp_path / "nothing").code == 2


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("first-load")
    return compress(tiny_models.build("llama", root / "model", layers=1), root / "packed", metric="magnitude").directory


class TestBeforeServing:
    """`serve.measure.first_load`: what the table does not know is measured before a model is loaded, within a budget."""

    @pytest.fixture
    def measured(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Shape, int]]:
        """What is measured, without measuring it: all 2:4 layers are slower."""
        found: list[tuple[Shape, int]] = []

        def measure(wanted: Any, **more: Any) -> Measured:
            wanted = list(wanted)
            found.extend(wanted)
            dtype = kernel_entries.dtype_name(more["dtype"])
            return Measured([entry(rows, 0.8, shape, dtype) for shape, rows in wanted], [])

        monkeypatch.setattr(kernel_table, "measure", measure)
        return found

    def test_once(self, packed: Path, measured: list[tuple[Shape, int]]) -> None:
        measure_unknown(packed, device="cpu", seconds=5, fused=False)
        assert DOWN in {shape for shape, _ in measured}
        assert slow_layers(packed)
        count = len(measured)
        measure_unknown(packed, device="cpu", seconds=5, fused=False)
        assert len(measured) == count, "the table knows them"
        measure_unknown(packed, device="cpu", seconds=5, fused=True)
        hidden = tiny_models.HIDDEN
        assert Shape(2 * tiny_models.INTERMEDIATE, hidden) in {shape for shape, _ in measured[count:]}

    @pytest.mark.parametrize("seconds", [0, None])
    def test_not_on_a_processor_unless_asked(
        self, packed: Path, measured: list[tuple[Shape, int]], seconds: float | None
    ) -> None:
        measure_unknown(packed, device="cpu", seconds=seconds, fused=True)
        assert not measured

    def test_on_a_gpu_for_a_while(
        self, packed: Path, measured: list[tuple[Shape, int]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[dict[str, Any]] = []
        monkeypatch.setattr(first_load, "choose_device", lambda wish: (torch.device("cuda", 1), "it is there"))
        monkeypatch.setattr(
            model_kernels, "document", lambda directory, **how: asked.append(how) or {"served_dense": {}}
        )
        measure_unknown(packed, device="auto", seconds=None, fused=True)
        measure_unknown(packed, device="auto", seconds=0, fused=True)
        [how] = asked
        assert (how["device"], how["budget"], how["fresh"], how["fused"]) == (
            "cuda:1",
            first_load.GPU_SECONDS,
            False,
            True,
        )

    def test_a_dense_model_is_not_measured(self, tmp_path: Path, measured: list[tuple[Shape, int]]) -> None:
        measure_unknown(tiny_models.build("llama", tmp_path / "dense", layers=1), device="cpu", seconds=5, fused=False)
        assert not measured

    def test_a_measurement_that_fails_does_not_stop_the_server(
        self, packed: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def broken(*arguments: Any, **more: Any) -> None:
            raise RuntimeError("CUDA error: an illegal instruction\nand more")

        monkeypatch.setattr(kernel_table, "measure", broken)
        measure_unknown(packed, device="cpu", seconds=5, fused=False)
        [line] = [record.getMessage() for record in caplog.records if record.name == "halve.serve"]
        assert line.startswith("2:4 is served without a measurement on this device: CUDA error: an illegal instruction")

    def test_the_server_does_it_before_it_loads(
        self, packed: Path, measured: list[tuple[Shape, int]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Loaded(Exception):
            pass

        def load(self: Any) -> None:
            assert measured, "the model was loaded before"
            raise Loaded

        monkeypatch.setattr("serve.engines.transformers.TransformersEngine.load", load)
        with pytest.raises(Loaded):
            server.run(str(packed), port=0, device="cpu", tune=5)

    def test_vllm_is_started_afterwards(
        self, packed: Path, measured: list[tuple[Shape, int]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Started(Exception):
            pass

        def become(*arguments: Any) -> None:
            assert measured, "vLLM was started before"
            raise Started

        monkeypatch.setattr(vllm.os, "execvpe", become)
        split = ["vllm", "--tensor-parallel-size", "2"]
        monkeypatch.setattr(vllm, "launch", lambda directory, **options: (split, {}))
        with pytest.raises(AssertionError, match="vLLM was started before"):  # of whose layers nothing could be known
            vllm.run(str(packed), tune=5)
        monkeypatch.setattr(vllm, "launch", lambda directory, **options: (["vllm"], {}))
        with pytest.raises(Started):
            vllm.run(str(packed), tune=5)
        assert Shape(2 * tiny_models.INTERMEDIATE, tiny_models.HIDDEN) in {shape for shape, _ in measured}


def slow_layers(packed: Path) -> bool:
    """Whether all of a checkpoint is served dense, as the table says."""
    model = load_model(packed)
    assert not any(isinstance(module, Sparse24Linear) for module in model.modules())
    found = tuned.decisions(CPU).values()
    return bool(found) and all(decision.why_dense for decision in found)


def test_the_layers_that_vllm_makes_of_several(tmp_path: Path) -> None:
    hidden, kv = tiny_models.HIDDEN, tiny_models.HIDDEN // tiny_models.HEADS * tiny_models.KV_HEADS
    model = shapes.read(str(tiny_models.build("llama", tmp_path / "llama", layers=3)))
    assert model.fused == (
        Layers("self_attn.qkv_proj", Shape(hidden + 2 * kv, hidden), 3),
        Layers("mlp.gate_up_proj", Shape(2 * tiny_models.INTERMEDIATE, hidden), 3),
    )
    assert shapes.read(str(tiny_models.build("gpt2", tmp_path / "gpt2", layers=1))).fused == ()


def test_a_layer_that_stays_dense_is_not_fused(tmp_path: Path) -> None:
    source = tiny_models.build("llama", tmp_path / "source", layers=2)
    first = "model.layers.0.self_attn.k_proj"
    directory = compress(source, tmp_path / "out", ignore=[first]).directory
    counts = {layers.name: layers.count for layers in shapes.read(str(directory)).fused}
    assert counts == {"self_attn.qkv_proj": 1, "mlp.gate_up_proj": 2}
