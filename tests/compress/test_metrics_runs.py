"""Every metric in a whole run: the pipeline gathers what it declares, and prunes by it."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from compress import pipeline, pruner
from compress.layer_statistics import LayerStatistics
from compress.methods import Metric
from compress.metrics import METRICS
from tests import tiny_models
from tests.compress.metric_cases import VARIANT_IDS, VARIANTS
from tests.runs import LENGTH, SAMPLES, calibration, compress


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OPT: all of its linears have a bias, and some of them read a norm."""
    return tiny_models.build("opt", tmp_path_factory.mktemp("models") / "opt", layers=1)


@cache
def layers(model: Path, metric: str, options: tuple[tuple[str, Any], ...]) -> list[dict[str, Any]]:
    """The report's records of the layers that were pruned, by their names."""
    chosen = dict(options)
    settings = {"pattern": "unstructured", "sparsity": 0.5, "format": "dense"} if chosen.get("variant") else {}
    out = model.parent / f"{metric}-{len(list(model.parent.iterdir()))}"
    compress(model, out, metric=metric, metric_options=chosen, reconstruction="none", **settings)
    records = json.loads((out / "report.json").read_text())["layers"]
    return [record for record in records if "relative_output_error" in record]


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=VARIANT_IDS)
def test_a_run(model: Path, name: str, options: dict[str, Any]) -> None:
    records = layers(model, name, tuple(options.items()))
    chance = layers(model, "random", ())
    assert [record["name"] for record in records] == [record["name"] for record in chance]
    assert len(records) == 6
    for record, by_chance in zip(records, chance, strict=True):
        assert record["metric"] == name
        assert record["sparsity"] == pytest.approx(0.5, abs=1e-3)
        assert (record.get("bias") == "corrected") == METRICS[name].corrects_bias
        if name != "random":
            assert record["relative_output_error"] < by_chance["relative_output_error"] / 2


@pytest.mark.parametrize("targets", ["own", "dense"])
def test_the_windows_are_those_that_were_observed(
    targets: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where channels are ordered by a part of the calibration: what a metric divides by the windows belongs to them."""
    seen: list[tuple[int, int]] = []

    def score(weight: Tensor, statistics: LayerStatistics, options: Any) -> Tensor:
        seen.append((statistics.windows, statistics.count))
        return weight.abs() * statistics.sum_of_squares.float()

    metric = Metric("test_windows", score, paper="none", cost="none", needs=frozenset({"sum_of_squares"}))
    monkeypatch.setitem(METRICS, metric.name, metric)
    monkeypatch.setattr(pipeline, "BATCH_TOKENS", 2 * LENGTH)
    monkeypatch.setattr(pruner, "PERMUTATION_TOKENS", 2 * LENGTH)
    compress(
        model,
        tmp_path / "out",
        metric=metric.name,
        reconstruction="none",
        permutation="fold",
        targets=targets,
        calibration=str(calibration(model.parent)),
    )
    assert {windows for windows, _ in seen} == ({SAMPLES} if targets == "own" else {2, SAMPLES})
    assert all(tokens == windows * LENGTH for windows, tokens in seen)


def test_stade_without_biases_is_warned_of(model: Path, tmp_path: Path) -> None:
    llama = tiny_models.build("llama", tmp_path / "llama", layers=1)

    def run(model: Path, name: str, **settings: Any) -> tuple[list[str], list[dict[str, Any]]]:
        settings = {"reconstruction": "none", "calibration": str(calibration(tmp_path)), **settings}
        report = compress(model, tmp_path / name, **settings).report
        return report["warnings"], report["layers"]

    for metric, count in (("stade", 7), ("stade-w", 2)):  # all, and those that read no norm
        for reconstruction in ("none", "refit"):
            warnings, records = run(llama, f"{metric}-{reconstruction}", metric=metric, reconstruction=reconstruction)
            (warning,) = [warning for warning in warnings if "bias" in warning]
            assert f"{metric} supposes that a bias takes over the mean" in warning
            assert f"{count} of 7 layers have none" in warning
            assert "--add-bias" in warning
            assert {record["bias"] for record in records} == {"the layer has none to correct"}
    assert run(llama, "added", metric="stade", add_bias=True)[0] == []
    assert run(llama, "wanda", metric="wanda")[0] == []
    assert run(model, "opt", metric="stade")[0] == []
