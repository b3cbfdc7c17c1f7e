"""Whole runs of the layer-wise methods on tiny models: from Python and the command, resumed, with permutations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compress.gram import held_out_period
from tests import tiny_models
from tests.compress.test_resume import interrupted
from tests.runs import LENGTH, SAMPLES, Halve, block_linears, compress, flags, kept_in_groups, load, tree

RUNS: dict[str, dict[str, Any]] = {
    "admm, folded": {"reconstruction": "admm", "permutation": "fold"},
    "admm, 4:8": {"reconstruction": "admm", "pattern": "4:8", "format": "dense", "permutation": "fold"},
    "admm, half": {"reconstruction": "admm", "pattern": "unstructured", "sparsity": 0.5, "format": "dense"},
    "admm from magnitude": {"reconstruction": "admm", "metric": "magnitude"},
    "alps, folded": {"reconstruction": "alps", "permutation": "fold"},
    "alps, half": {"reconstruction": "alps", "pattern": "unstructured", "sparsity": 0.5, "format": "dense"},
    "refit": {"reconstruction": "refit"},
    "refit of ria, folded": {"reconstruction": "refit", "metric": "ria", "permutation": "fold"},
}


@pytest.mark.parametrize(
    ("name", "family"), [*((name, "qwen2") for name in RUNS), ("admm, folded", "llama"), ("alps, folded", "gpt2")]
)
def test_python_the_command_and_a_resumed_run_agree_to_the_bit(
    name: str, family: str, tmp_path: Path, halve: Halve
) -> None:
    settings = RUNS[name]
    source = tiny_models.build(family, tmp_path / "source", layers=2)
    done = compress(source, tmp_path / "python", **settings)
    called = halve(*flags(source, tmp_path / "command", **settings))
    assert called.code == 0, called.stderr
    expected = tree(done.directory)
    assert tree(tmp_path / "command") == expected
    interrupted(source, tmp_path / "resumed", blocks=1, **settings)
    compress(source, tmp_path / "resumed", resume=True, **settings)
    assert tree(tmp_path / "resumed") == expected


@pytest.mark.parametrize("name", RUNS)
def test_the_report_says_what_was_chosen_and_the_pattern_holds(name: str, tmp_path: Path) -> None:
    settings = RUNS[name]
    source = tiny_models.build("qwen2", tmp_path / "source", layers=1)  # with biases at q, k and v
    done = compress(source, tmp_path / "out", **settings)
    report = json.loads((done.directory / "report.json").read_text())
    held_out = SAMPLES // held_out_period(SAMPLES)
    weights = block_linears(load(done.directory))
    for layer in report["layers"]:
        assert layer["held_out_tokens"] == held_out * LENGTH
        assert 0 < layer["fit_error"] < layer["held_out_error"] < 1
        assert layer["damping"] > 0
        assert layer["tokens_per_input"] == pytest.approx(SAMPLES * LENGTH / layer["shape"][1], abs=1e-3)
        assert ("bias" in layer) is (layer["name"].split(".")[-1] in ("q_proj", "k_proj", "v_proj"))
        assert layer["sparsity"] == pytest.approx(0.5, abs=1e-3)
        if ":" in (pattern := settings.get("pattern", "2:4")):
            keep_n, m = map(int, pattern.split(":"))
            assert int(kept_in_groups(weights[layer["name"]], m).max()) <= keep_n
    if "permutation" in settings:
        assert report["summary"]["layers_permuted"] == 2
