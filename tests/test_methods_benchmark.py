"""The plan of the table of methods is whole, and the page says what was not run and which order does not hold."""

from __future__ import annotations

import argparse
import json
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks import methods
from benchmarks.methods import GRADIENT_METRICS, Cell, Protocol, cells
from benchmarks.methods import METRICS as ROWS
from benchmarks.methods import RECONSTRUCTIONS as COLUMNS
from benchmarks.methods_table import CLAIMS, render
from compress.gradients import RECORD
from compress.metrics import METRICS
from compress.recipe import Recipe
from compress.reconstruction import RECONSTRUCTIONS


def test_the_plan_is_the_whole_table() -> None:
    plan = cells()
    keys = [cell.key for cell in plan]
    assert len(set(keys)) == len(keys)
    assert {f"{metric} + {column} 2:4" for metric in METRICS for column in COLUMNS} <= set(keys)
    assert set(ROWS) == METRICS.keys()
    assert set(COLUMNS) <= RECONSTRUCTIONS.keys()
    assert {cell.reconstruction for cell in plan} == RECONSTRUCTIONS.keys()
    assert {cell.pattern for cell in plan} == {"2:4", "4:8", "unstructured"}
    for cell in plan:
        settings = {key: value for key, value in asdict(cell).items() if key != "options"}
        options = "metric_options" if cell.metric and cell.reconstruction == "none" else "reconstruction_options"
        Recipe.create(format="dense", **settings, **{options: cell.options})


def test_the_claims_are_about_cells_of_the_plan() -> None:
    keys = {cell.key for cell in cells()}
    for claim in CLAIMS:
        assert {claim.better, claim.worse} <= keys, claim
        assert claim.better != claim.worse


def result(cell: Cell, perplexity: float) -> dict[str, Any]:
    environment = {"date": "2026-01-01", "machine": "one", "cores": 2, "threads": 1, "versions": {"halve": "0"}}
    measured = {"perplexity": perplexity, "relative_output_error": 0.05, "sparsity_reached": 0.5}
    return {**asdict(cell), **measured, "seconds": 60.0, "processor_seconds": 55.0, "peak_bytes": 1e9, "workers": 2} | {
        "attention": "sdpa",
        "environment": environment,
    }


@pytest.mark.parametrize(("wanda", "verdict"), [(150.0, "yes"), (4000.0, "**no**")])
def test_the_page(wanda: float, verdict: str) -> None:
    done = [result(Cell("magnitude", "none"), 3256.6), result(Cell("wanda", "none"), wanda)]
    document = {
        "model": "model",
        "protocol": asdict(Protocol()),
        "dense": 20.39,
        "cells": {f"{run['metric']} + none 2:4": run for run in done},
    }
    page = render(document, cells(), ROWS, COLUMNS)
    lines = page.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    table = lines[start : start + 4]
    assert table[0] == "| metric | " + " | ".join(COLUMNS) + " |"
    assert table[2].split("|")[1:4] == [" magnitude ", " 3257 (0.050) ", "  "]
    assert table[3].startswith("| wanda | ")
    assert lines[start + 4] == "", "rows of which nothing was run are left out"
    assert f"Not run yet: {len(cells()) - 2} of {len(cells())} cells" in page
    claim = next(line for line in lines if line.startswith("| Wanda | wanda + none 2:4 |"))
    assert claim.rstrip(" |").endswith(verdict)
    assert "| wanda + none 2:4 | " + (f"{wanda:.2f}" if wanda < 1000 else f"{wanda:.0f}") in page


def test_only_the_cell_that_gathers_the_gradients_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that waited for them did not gather them; nor does it keep others from running."""
    both = threading.Barrier(2)

    def run_cell(cell: Cell, model: Path, work: Path, protocol: Protocol, threads: int) -> dict[str, Any]:
        record = work / "gradients" / RECORD
        if not record.is_file():
            time.sleep(0.2)  # the others get to wait
            record.parent.mkdir(exist_ok=True)
            record.write_text("{}")
        else:
            both.wait(30)  # the two that did not gather run side by side
        return result(cell, 100.0)

    monkeypatch.setattr(methods, "run_cell", run_cell)
    arguments = argparse.Namespace(budget=float("inf"), threads=1, workers=3)
    missing = [Cell(metric, "none") for metric in GRADIENT_METRICS] + [Cell("gblm", "sparsegpt")]
    document: dict[str, Any] = {"model": "model", "protocol": asdict(Protocol()), "dense": 20.39, "cells": {}}
    path = tmp_path / "methods.json"
    methods._run_missing(missing, tmp_path, tmp_path, Protocol(), arguments, document, path)
    gathered = [run["gathered_gradients"] for run in json.loads(path.read_text())["cells"].values()]
    assert sorted(gathered) == [False, False, True]
    assert path.with_suffix(".md").read_text().count("with the gradients") == 1


def test_a_tie_is_told_by_how_much() -> None:
    document = {"model": "model", "protocol": asdict(Protocol()), "dense": 20.39, "cells": {}}
    for metric, perplexity in (("stochria", 210.0), ("ria", 200.0), ("wanda", 100.0)):
        document["cells"][f"{metric} + none 2:4"] = result(Cell(metric, "none"), perplexity)
    page = render(document, cells(), ROWS, COLUMNS)
    (tie,) = [line for line in page.splitlines() if "stochRIA: about equal" in line]
    assert tie.split(" | ")[1:3] == ["stochria + none 2:4", "ria + none 2:4"]
    assert tie.endswith("| 1.05 times |")
