"""Every metric in a whole run: the pipeline gathers what it declares, and prunes by it."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from compress.metrics import METRICS
from tests import tiny_models
from tests.compress.metric_cases import VARIANT_IDS, VARIANTS
from tests.runs import compress


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
