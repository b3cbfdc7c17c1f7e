"""What `halve compare` makes of the documents of endpoints: rounds are what is sampled, not requests."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compress.errors import UsageError
from serve.measure import statistics
from serve.measure.compare import compare
from serve.measure.documents import DocumentError, read
from serve.measure.generator import Outcome, Outcomes
from serve.measure.latency import round_of, summary
from serve.measure.statistics import interval
from tests.runs import Halve

REQUESTS, TOKENS = 8, 16


def round_with(generator: np.random.Generator, tpot: float, mood: float) -> dict[str, Any]:
    """A round of requests that share the round's mood, and differ a little among themselves."""
    requests = []
    for number in range(REQUESTS):
        own = float(np.exp(mood + generator.normal(0, 0.01)))
        first = 0.1 * own
        tokens = [number + first + own * tpot * i for i in range(TOKENS)]
        requests.append(Outcome(float(number), float(number), 0.0, tokens[-1], tokens, TOKENS))
    return round_of(Outcomes(requests, max(r.ended for r in requests) * float(np.exp(mood)), 0.01), {"ttft": 10.0})


def bench(
    seed: int, *, rounds: int = 8, tpot: float = 0.02, scatter: float = 0.01, common: float = 0.0, **changes: Any
) -> dict[str, Any]:
    """``scatter``: of the mood of a round and side; ``common``: of what both sides of a round share."""
    generator = np.random.default_rng(seed)
    found: dict[str, list[Any]] = {"dense": [], "sparse": []}
    for _ in range(rounds):
        shared = generator.normal(0, common)
        for name, factor in (("dense", 1.0), ("sparse", tpot / 0.02)):
            mood = shared + generator.normal(0, scatter)
            found[name].append(round_with(generator, 0.02 * factor, mood))
    document = {
        "kind": "bench", "through": "endpoint", "complete": True, "rounds_done": rounds, "environment": {},
        "load": {"engine": "transformers", "prompt": 128, "output": TOKENS, "rounds": rounds, "levels": ["concurrency=4"]},
        "models": {
            name: {"directory": name, "bytes": {"disk": 9}, "loads": {"concurrency=4": summary(done)}}
            for name, done in found.items()
        },
    }  # fmt: skip
    document["load"].update(changes)
    return document


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def to_file(document: Any, name: str = "a.json") -> Path:
        path = tmp_path / name
        path.write_text(json.dumps(document))
        return path

    return to_file


@pytest.fixture
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 999)


def test_figures_and_their_values(write: Any) -> None:
    document = bench(1)
    side, dense = read(write(document))
    assert dense is not None
    rounds = document["models"]["sparse"]["loads"]["concurrency=4"]["rounds"]
    names = {f"{time}.{of}" for time in ("ttft", "tpot", "itl", "e2e") for of in ("mean", "p50", "p90", "p99")}
    rates = {"requests_per_second", "output_tokens_per_second", "goodput_per_second"}
    assert set(side.figures) == names | rates | {"bytes.disk", "errors"}
    by_hand = [
        np.percentile([(r["events"][-1] - r["events"][0]) / (TOKENS - 1) for r in one["requests"]], 90)
        for one in rounds
    ]
    assert side.figures["tpot.p90"].value == pytest.approx(np.median(by_hand), rel=1e-4)
    assert len(side.figures["tpot.p90"].samples) == 8
    assert side.figures["tpot.p90"].pairing == dense.figures["tpot.p90"].pairing
    assert (side.figures["tpot.p90"].better, side.figures["goodput_per_second"].better) == ("lower", "higher")


def test_several_loads_carry_their_names(write: Any) -> None:
    document = bench(1)
    for model in document["models"].values():
        model["loads"]["rate=2.5"] = copy.deepcopy(model["loads"]["concurrency=4"])
    found = compare(write(document), gates=["concurrency=4.tpot.p50<=1.1x", "rate=2.5.ttft.p99>=0.001"])
    assert found["ok"]
    assert "rate=2.5.output_tokens_per_second" in found["figures"]


def verdicts(document: dict[str, Any], names: list[str], path: Path) -> list[str]:
    """Of the sparse side of a document beside its dense one."""
    path.write_text(json.dumps(document))
    figures = compare(path)["figures"]
    return [figures[name]["verdict"] for name in names]


@pytest.mark.usefixtures("few_resamples")
def test_two_sides_that_are_the_same_are_no_different(tmp_path: Path) -> None:
    """Of every figure at least 95 of 100, although the requests of a round are alike and rounds differ by 20 %."""
    names = ["ttft.p50", "ttft.p99", "tpot.p50", "tpot.mean", "e2e.p90", "requests_per_second"]
    found = [
        verdicts(bench(seed, rounds=7 + seed % 3, scatter=0.05, common=0.2), names, tmp_path / "x.json")
        for seed in range(120)
    ]
    for index, name in enumerate(names):
        assert sum(one[index] == "no difference" for one in found) >= 0.95 * len(found), name


@pytest.mark.usefixtures("few_resamples")
def test_two_runs_of_the_same_thing_are_no_different(tmp_path: Path) -> None:
    """Two documents, whose rounds have nothing in common."""
    alike = 0
    for seed in range(100):
        for name, own in (("a", seed), ("b", seed + 1000)):
            (tmp_path / name).write_text(json.dumps(bench(own, scatter=0.05)))
        alike += compare(tmp_path / "a", tmp_path / "b")["figures"]["tpot.p50"]["verdict"] == "no difference"
    assert alike >= 95


def test_requests_would_find_differences_that_are_none() -> None:
    """The intervals of requests' means, as if they were independent, miss the truth in most of the cases; rounds' do not."""
    missed = {"requests": 0, "rounds": 0}
    for seed in range(100):
        generator = np.random.default_rng(seed)
        rounds = [round_with(generator, 0.02, generator.normal(0, 0.05)) for _ in range(8)]
        truth = 0.02 * np.exp(0.05**2 / 2)
        pooled = interval([value for one in rounds for value in one["samples"]["tpot"]], "mean")
        by_round = interval([one["figures"]["tpot"]["mean"] for one in rounds], "mean")
        assert pooled is not None
        assert by_round is not None
        missed["requests"] += pooled.misses(truth)
        missed["rounds"] += by_round.misses(truth)
    assert missed["requests"] > 30
    assert missed["rounds"] <= 10


@pytest.mark.usefixtures("few_resamples")
@pytest.mark.parametrize(("scatter", "rounds"), [(0.01, 8), (0.03, 30)])
def test_a_regression_of_5_percent_is_found_with_the_stated_rounds(scatter: float, rounds: int, tmp_path: Path) -> None:
    """Those that `statistics` states, also where the rounds themselves differ by 20 %, as both sides share it."""
    found = [
        verdicts(
            bench(seed, rounds=rounds, tpot=0.021, scatter=scatter, common=0.2), ["tpot.p50"], tmp_path / "x.json"
        )[0]
        for seed in range(60)
    ]  # fmt: skip
    assert found.count("worse") >= 0.95 * len(found)


def test_an_interrupted_run_is_marked(write: Any, halve: Halve) -> None:
    document = bench(1, rounds=7)
    document["complete"] = False
    document["load"]["rounds"] = 30
    called = halve("compare", write(document), write(bench(2), "b.json"))
    assert called.code == 0
    assert "note: rounds: 7 of 30 (interrupted) against 8" in " ".join(called.stdout.split())


def test_an_endpoint_is_not_a_process(write: Any) -> None:
    process = {
        "kind": "bench", "load": {"prompt": 128, "output": TOKENS}, "models": {"model": {"bytes": {"disk": 3}}}
    }  # fmt: skip
    with pytest.raises(UsageError, match="through 'endpoint' against 'process'"):
        compare(write(bench(1)), write(process, "b.json"))
    with pytest.raises(UsageError, match="levels"):
        compare(write(bench(1)), write(bench(2, levels=["concurrency=1"]), "b.json"))


def damaged(change: Any) -> dict[str, Any]:
    document = bench(1, rounds=2)
    change(document["models"]["sparse"]["loads"]["concurrency=4"]["rounds"])
    return document


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda rounds: rounds.clear(), r"is damaged: rounds"),
        (lambda rounds: rounds[0].pop("figures"), r"is damaged: rounds\.0\.figures"),
        (lambda rounds: rounds[1]["figures"].pop("tpot"), r"concurrency=4: tpot\.mean is not in every round"),
        (lambda rounds: rounds[1]["figures"]["tpot"].update(p50=-1.0), r"tpot\.p50 is not in every round"),
        (lambda rounds: rounds[1]["figures"]["tpot"].update(p50="fast"), r"is damaged: rounds\.1\.figures\.tpot"),
    ],
)
def test_what_is_damaged_is_refused(change: Any, told: str, write: Any) -> None:
    with pytest.raises(DocumentError, match=told):
        read(write(damaged(change)))
