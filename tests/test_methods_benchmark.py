"""The plan of the table of methods is whole, and the page says what was not run and which order does not hold."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from benchmarks.methods import METRICS as ROWS
from benchmarks.methods import RECONSTRUCTIONS as COLUMNS
from benchmarks.methods import Cell, Protocol, cells
from benchmarks.methods_table import CLAIMS, render
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
