"""What `benchmarks.vllm_speed` says of its rounds: how many, how far apart, and nothing of too few."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import readme
from benchmarks.vllm_speed import LOADS, RESULTS, render, server_of, summary
from serve.engines import vllm as engine
from tests import tiny_models


def document(rounds: int, latency: int) -> dict[str, Any]:
    """In round i 2:4 takes 1 / (i + 1) of the time, and gives (i + 1) times the tokens."""
    found: dict[str, Any] = {
        "rounds": [
            {
                "decode": {"dense": {"median_tpot_ms": 60.0}, "sparse": {"median_tpot_ms": 60.0 / factor}},
                "prefill": {"dense": {"median_ttft_ms": 60.0}, "sparse": {"median_ttft_ms": 60.0 / factor}},
                "eight": {"dense": {"output_throughput": 1.0}, "sparse": {"output_throughput": 1.0 * factor}},
            }
            for factor in range(1, rounds + 1)
        ],
        "memory": {"dense": 2**30, "sparse": 2**29},
        "said": {"sparse": []},
    }
    return {
        "model": "m",
        "vllm": ["vllm", "1"],
        "loads": LOADS,
        "cache_gib": 1,
        "threads": {"2": {**found, **summary(found, LOADS)}},
        "latency": {"dense": [4.0] * latency, "sparse": [2.0] * latency, "threads": "2"},
    }


def rows(text: str) -> list[str]:
    return [line.split("|")[-2].strip() for line in text.splitlines() if line.startswith("| 2 ")]


def test_the_range_of_the_rounds_is_there() -> None:
    assert rows(render(document(5, 3))) == [*["3.00 (1.00 to 5.00, 5 rounds)"] * 3, "2.00 (2.00 to 2.00, 3 rounds)"]


@pytest.mark.parametrize(("latency", "said"), [(1, "1 round, too few"), (2, "2 rounds, too few")])
def test_few_rounds_give_no_ratio(latency: int, said: str) -> None:
    text = render(document(2, latency))
    assert rows(text) == ["2 rounds, too few for a ratio"] * 3, "the latency is in no line of the table"
    assert f"dense 4.00 s, 2:4 2.00 s ({said} for a ratio)" in text


def test_no_prompt_is_in_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The generator sends the first prompt of a load before it measures, twice."""
    monkeypatch.setattr(engine, "_require_vllm", lambda: "vllm")
    model = tiny_models.build("llama", tmp_path / "dense", layers=1)
    assert "--no-enable-prefix-caching" in server_of(model, LOADS)._command


def test_the_page_is_what_was_measured() -> None:
    kept = json.loads((RESULTS / "vllm_speed.json").read_text())
    assert render(kept) == (RESULTS / "vllm_speed.md").read_text()
    for found in kept["threads"].values():
        assert summary(found, kept["loads"]) == {key: found[key] for key in ("figures", "ratios")}
    quoted = [line for line in readme.table("vllm_speed").splitlines() if line.startswith("| 2 ")]
    assert quoted
    assert all("rounds)" in line for line in quoted)
