"""Layers that 2:4 makes slower are served dense: when, which, with the same results, and never without a measurement."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from compress.packed import unpack
from serve.linear import Sparse24Conv1D, Sparse24Linear
from serve.loading import load_model
from serve.measure import kernel_table, table_cache, tuned
from serve.measure.kernel_table import ROWS, Entry, Shape, Spread, random_packed
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


def entry(rows: int, median: float, shape: Shape = DOWN, dtype: str = "bfloat16", spread: float = 0.01) -> Entry:
    return Entry(
        n=shape.n, k=shape.k, conv1d=shape.conv1d, dtype=dtype, rows=rows,
        ratio=Spread(median=median, p25=median * (1 - spread), p75=median * (1 + spread)),
        sparse_seconds=1e-3, dense_seconds=1e-3 * median, backend="cpu", reason="because",
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
    tuned._slow_shapes_once.cache_clear()
    try:
        assert "dense is faster" in (tuned.why_dense(CPU, torch.bfloat16, DOWN.n, DOWN.k) or "")
        assert tuned.why_dense(CPU, torch.float16, DOWN.n, DOWN.k) is None
        assert tuned.why_dense(CPU, torch.bfloat16, DOWN.k, DOWN.n) is None
        monkeypatch.setattr(table_cache, "load", lambda identity: pytest.fail("read again"))
        assert tuned.why_dense(CPU, torch.bfloat16, DOWN.n, DOWN.k) is not None
    finally:
        tuned._slow_shapes_once.cache_clear()


def test_a_module_of_modules_and_a_bias() -> None:
    keep(0.8)
    layers = nn.ModuleList(
        random_packed(nn.Linear(DOWN.k, DOWN.n, bias=bias), torch.bfloat16, CPU) for bias in (False, True)
    )
    x = torch.randn(5, DOWN.k).bfloat16()
    expected = [layer(x) for layer in layers]
    replaced = tuned.serve_dense_where_faster(layers)
    assert set(replaced) == {"0", "1"}
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
