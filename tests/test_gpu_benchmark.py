"""The benchmark of the GPU kernels, as far as a machine without one can see it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_checks, gpu_pruning, gpu_table, gpu_timing
from serve.kernels.cuda import backend
from tests.runs import beside


def document() -> dict[str, Any]:
    """A run's document with a row of every section. The figures are made up."""
    gain = {"2:4": {"median": 1.5, "p25": 1.4, "p75": 1.6}}
    times = {"microseconds": {"2:4": 2.0, "dense": 3.0}, "speedup": gain}
    return {
        "environment": {"date": "2000-01-01", "gpu": "None", "capability": "9.0", "torch": "2", "cuda": "13", "nvrtc": "13"},
        "checks": [{"name": "rows", "wrong": None}, {"name": "edges", "wrong": "3 outputs are wrong"}],
        "copy_gigabytes_per_second": 1000.0,
        "decode": [{"n": 64, "k": 128, "rows": 1, **times, "of_copy": 0.75, "gigabytes_per_second": {"2:4": 750, "dense": 800}}],
        "block": [{"tokens": 1, **times}],
        "prefill": [{"n": 64, "k": 128, "rows": 2048, **times}],
        "triton": [{"n": 64, "k": 128, "rows": 16, **times}],
        "pruning": [{"n": 64, "k": 128, "seconds": {"fused": 0.25, "torch": 0.5}, "peak_bytes": 3e9}],
        "host": [{"microseconds": {"operator": 9.0}}],
        "splits": [{"n": 64, "k": 128, "rows": 1, "chosen": 2, "microseconds": {"1": 3.0, "2": 2.0}}],
        "forms": [{"n": 64, "k": 128, "rows": 1, "form": "Form(1)", "refused": "no"}],
        "broken": {"host": "RuntimeError: why"},
        "left_out": ["forms 64 rows"],
    }  # fmt: skip


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """One line, exit code 2, and no result."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path / "out")])
    assert gpu.main() == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "error: no GPU to measure: torch finds none that it can use\n"
    assert beside(tmp_path / "any") == []


def test_the_table_says_all_that_was_measured() -> None:
    text = gpu_table.render(document())
    for part in (
        "1 of 2 right",
        "WRONG edges: 3 outputs are wrong",
        "| 64 x 128 | 1 | 2.00 | 3.00 | 1.50 | 1.40 to 1.60 |  | 750 | 75% | 800 |",
        "| 1 tokens | 2.0 | 3.0 | 2:4 1.50 |",
        "| 64 x 128, 2048 rows | 2.0 | 3.0 | 2:4 1.50 |",
        "| 64 x 128, 16 rows | 2.0 | 3.0 | 2:4 1.50 |",
        "- 64 x 128: fused 0.250 s, torch 0.500 s; peak memory 3.0 GB",
        "operator 9.0 us",
        "chosen 2: 1: 3.00, 2: 2.00",
        "Form(1): no",
        "Broken: host: RuntimeError: why",
        "Left out for want of time: forms 64 rows",
    ):
        assert part in text, part


def test_any_part_of_the_document_makes_a_table() -> None:
    """It is written after every figure, so whatever is there must do."""
    whole = document()
    needed = {name: whole[name] for name in ("environment", "broken", "left_out")}
    for name, value in whole.items():
        assert gpu_table.render({**needed, name: value}).startswith("# 2:4 on None")


def test_ratios_are_within_a_round() -> None:
    found = gpu_timing.summary({"2:4": [1.0, 2.0, 4.0], "dense": [2.0, 3.0, 4.0]})
    assert found["microseconds"] == {"2:4": 2.0, "dense": 3.0}
    assert found["speedup"]["2:4"]["median"] == 1.5


def test_where_the_sparse_kernels_do_not_run_the_others_are_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """AMD's GPUs, or no NVRTC: what needs them is left out, and it is said why."""
    ran: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "environment", lambda: document()["environment"])
    monkeypatch.setattr(backend, "why_not", lambda device, dtype: "this torch is built without CUDA")
    monkeypatch.setattr(gpu, "SECTIONS", {name: lambda run, name=name: ran.append(name) for name in gpu.SECTIONS})
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path)])
    assert gpu.main() == 1
    assert ran == [name for name in gpu.SECTIONS if name in gpu.ON_ANY_GPU]
    assert "Broken: cuda: this torch is built without CUDA" in (tmp_path / "gpu.md").read_text()


def test_a_check_that_breaks_does_not_hide_the_next() -> None:
    def breaks() -> None:
        raise KeyError("of Triton's own kind")

    def right() -> None:
        pass

    found = dict(gpu_checks.run([breaks]))
    assert found["breaks"] is not None
    assert "KeyError" in found["breaks"]
    assert "CUDA" in str(dict(gpu_checks.run([right]))["right"]) or torch.cuda.is_available()


def test_what_a_whole_models_pruning_takes(tmp_path: Path) -> None:
    """The same code on a processor and on tiny blocks."""
    width = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2}
    settings = {"reconstruction": "sparsegpt", "samples": 4, "length": 32, "device": "cpu"}
    result = gpu_pruning.measure(tmp_path, (1, 2), 8, width, settings)
    first, second = result["runs"]
    assert (first["blocks"], second["blocks"], first["fused"], first["gpu_bytes"]) == (1, 2, False, None)
    assert result["block_seconds"] == pytest.approx(second["seconds"] - first["seconds"])
    assert result["whole_seconds"] == pytest.approx(first["seconds"] + 7 * result["block_seconds"])
    text = gpu_pruning.render({**result, "environment": {"machine": "none", "date": "2000-01-01"}})
    assert "| 2 | " in text
    assert "(extrapolated, not run)" in text


def test_a_whole_models_pruning_needs_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_pruning"])
    with pytest.raises(SystemExit) as ended:
        gpu_pruning.main()
    assert ended.value.code == 2
    assert "there is no GPU to measure" in capsys.readouterr().err
