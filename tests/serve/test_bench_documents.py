"""What `halve compare` makes of the documents of endpoints: rounds are what is sampled, requests that fail count."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compress.errors import UsageError
from serve.measure import statistics, tables
from serve.measure.compare import compare
from serve.measure.documents import DocumentError, read
from serve.measure.latency import round_of, summary
from serve.measure.outcomes import Outcome, Outcomes
from serve.measure.statistics import interval
from tests.runs import Halve

REQUESTS, TOKENS = 8, 16


def round_with(
    generator: np.random.Generator, tpot: float, mood: float, *, requests: int = REQUESTS, own: float = 0.01
) -> dict[str, Any]:
    """A round of requests that share the round's mood, and differ a little among themselves."""
    outcomes = []
    for number in range(requests):
        factor = float(np.exp(mood + generator.normal(0, own)))
        first = 0.1 * factor
        tokens = [number + first + factor * tpot * i for i in range(TOKENS)]
        outcomes.append(Outcome(float(number), float(number), 0.0, tokens[-1], tokens, TOKENS))
    return round_of(Outcomes(outcomes, max(r.ended for r in outcomes) * float(np.exp(mood)), 0.01), {"ttft": 10.0})


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
            name: {"directory": name, "weights_sha256": name, "bytes": {"disk": 9}, "loads": {"concurrency=4": summary(done)}}
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
    sampled = document["models"]["sparse"]["loads"]["concurrency=4"]
    names = {f"{time}.{of}" for time in ("ttft", "tpot", "itl", "e2e") for of in ("mean", "p50", "p90", "p99")}
    rates = {"requests_per_second", "output_tokens_per_second", "goodput_per_second"}
    assert set(side.figures) == names | rates | {"bytes.disk", "errors"}
    for name in names:  # what `halve bench` prints, and not the median of what a round's "p99" was
        time, of = name.split(".")
        assert side.figures[name].value == sampled[f"{time}_seconds"][of]
    by_hand = [
        [(r["events"][-1] - r["events"][0]) / (TOKENS - 1) for r in one["requests"]] for one in rounds
    ]  # fmt: skip
    assert side.figures["tpot.p90"].value == pytest.approx(np.percentile(np.concatenate(by_hand), 90), rel=1e-4)
    assert side.figures["tpot.p50"].samples == pytest.approx([np.median(one) for one in by_hand], rel=1e-4)
    assert [len(one) for one in side.figures["tpot.p90"].rounds] == [REQUESTS] * 8
    assert side.figures["tpot.p90"].pairing == dense.figures["tpot.p90"].pairing
    assert (side.figures["tpot.p90"].better, side.figures["goodput_per_second"].better) == ("lower", "higher")


def test_several_loads_carry_their_names(write: Any) -> None:
    document = bench(1)
    for model in document["models"].values():
        model["loads"]["rate=2.5"] = copy.deepcopy(model["loads"]["concurrency=4"])
    found = compare(write(document), gates=["concurrency=4.tpot.p50<=1.1x", "rate=2.5.ttft.p99>=0.001"])
    assert found["ok"]
    assert "rate=2.5.output_tokens_per_second" in found["figures"]


def test_memory_that_was_read_once_is_no_difference(write: Any) -> None:
    """A few pages more, or what a server that starts second finds free; bytes on the disk are exact."""
    document = bench(1)
    for number, model in enumerate(document["models"].values()):
        model["peak_process_bytes"] = model["peak_gpu_bytes"] = 600_000_000 + 4096 * number
        model["bytes"] = {"disk": 9 - number, "kv_cache": 1_000_000_000 - 4096 * number}
    names = ["peak_process_bytes", "peak_gpu_bytes", "bytes.kv_cache", "bytes.disk"]
    found = compare(write(document), gates=["peak_process_bytes<=1.01x"])
    assert [found["figures"][name]["verdict"] for name in names] == [*["unknown"] * 3, "better"]
    assert found["figures"]["peak_process_bytes"]["ratio"] == 600_004_096 / 600_000_000
    assert found["ok"]


def verdicts(document: dict[str, Any], names: list[str], path: Path) -> list[str]:
    """Of the sparse side of a document beside its dense one."""
    path.write_text(json.dumps(document))
    figures = compare(path)["figures"]
    return [figures[name]["verdict"] for name in names]


@pytest.mark.usefixtures("few_resamples")
def test_two_sides_that_are_the_same_are_no_different(tmp_path: Path) -> None:
    """Of every figure at least 95 of 100, although the requests of a round are alike and rounds differ by 20 %."""
    names = ["ttft.p50", "ttft.p90", "tpot.p50", "tpot.mean", "e2e.p90", "requests_per_second"]
    found = [
        verdicts(bench(seed, rounds=7 + seed % 3, scatter=0.05, common=0.2), names, tmp_path / "x.json")
        for seed in range(120)
    ]
    for index, name in enumerate(names):
        assert sum(one[index] == "no difference" for one in found) >= 0.95 * len(found), name


LOADS = {"concurrency=1": 4, "concurrency=4": 8, "concurrency=16": 32}


def sweep(seed: int, rounds: int, *, slower: float = 0.0, scatter: float = 0.009) -> dict[str, Any]:
    """Three loads, whose figures go together: a round's mood is in all of its times, and each time in several figures."""
    generator = np.random.default_rng(seed)
    loads: dict[str, dict[str, list[Any]]] = {name: {label: [] for label in LOADS} for name in ("dense", "sparse")}
    for _ in range(rounds):
        for label, requests in LOADS.items():
            shared = generator.normal(0, 0.1)
            for name, factor in (("dense", 1.0), ("sparse", 1 + slower)):
                mood = shared + generator.normal(0, scatter)
                done = round_with(generator, 0.02 * factor, mood, requests=requests)
                loads[name][label].append(done)
    document = bench(seed, rounds=1, levels=list(LOADS))
    document["load"]["rounds"] = rounds
    for name, model in document["models"].items():
        model["loads"] = {label: summary(done) for label, done in loads[name].items()}
    return document


@pytest.mark.usefixtures("few_resamples")
def test_a_whole_comparison_of_equal_sides_finds_nothing(tmp_path: Path) -> None:
    """Of comparisons of 60 figures, not of figures, at most 4 in 100; of 40 that are two but for bad luck."""
    wrong = 0
    for seed in range(40):
        (tmp_path / "x.json").write_text(json.dumps(sweep(seed, 8)))
        figures = compare(tmp_path / "x.json")["figures"]
        assert len(figures) == 3 * 20 + 1
        wrong += any(figure["verdict"] in ("better", "worse") for figure in figures.values())
    assert wrong <= 5


@pytest.mark.usefixtures("few_resamples")
def test_among_many_figures_a_regression_of_5_percent_is_found(tmp_path: Path) -> None:
    """With the rounds that `statistics` states, although 60 figures are asked."""
    found = []
    for seed in range(30):
        (tmp_path / "x.json").write_text(json.dumps(sweep(seed, 8, slower=0.05)))
        found.append(compare(tmp_path / "x.json")["figures"]["concurrency=4.tpot.p50"]["verdict"])
    assert found.count("worse") >= 28


def sitting(seed: int, shift: float, **changes: Any) -> dict[str, Any]:
    """A run on a day on which the machine was slower by ``shift``, whatever it ran."""
    document = bench(seed, **changes)
    for model in document["models"].values():
        for load in model["loads"].values():
            for one in load["rounds"]:
                for request in one["requests"]:
                    begin = request["intended"]
                    request["events"] = [begin + (when - begin) * (1 + shift) for when in request["events"]]
                for name in ("requests_per_second", "output_tokens_per_second", "goodput_per_second"):
                    one["figures"][name] /= 1 + shift
    return document


@pytest.mark.usefixtures("few_resamples")
def test_two_runs_of_the_same_thing_are_no_different(tmp_path: Path) -> None:
    """Two documents, whose rounds have nothing in common, and whose machine was faster in one of them."""
    alike = 0
    for seed in range(40):
        for name, own in (("a", seed), ("b", seed + 1000)):
            shift = 0.02 if name == "a" else 0.0
            (tmp_path / name).write_text(json.dumps(sitting(own, shift, scatter=0.005, common=0.01)))
        figures = compare(tmp_path / "a", tmp_path / "b")["figures"]
        alike += not any(figure["verdict"] in ("better", "worse") for figure in figures.values())
    assert alike >= 36


@pytest.mark.usefixtures("few_resamples")
def test_a_regression_between_two_runs_is_found_by_the_dense_model_of_both(tmp_path: Path) -> None:
    """Also where the machine of the second run makes up for it, so that the times themselves are the same."""
    found = []
    for seed in range(20):
        (tmp_path / "a").write_text(json.dumps(sitting(seed, -0.05, scatter=0.005, tpot=0.021)))
        (tmp_path / "b").write_text(json.dumps(sitting(seed + 1000, 0.0, scatter=0.005)))
        figure = compare(tmp_path / "a", tmp_path / "b")["figures"]["tpot.p50"]
        assert figure["relative_to"] == "dense"
        assert figure["ratio"] == pytest.approx(1.05, abs=0.03)
        assert figure["a"] / figure["b"] == pytest.approx(1.05 * 0.95, abs=0.03)
        found.append(figure["verdict"])
    assert found.count("worse") >= 19


def test_two_runs_without_a_common_dense_model_say_so(write: Any) -> None:
    a, b = bench(1, tpot=0.024), bench(2)
    a["models"]["dense"]["weights_sha256"] = "of another model"
    found = compare(write(a), write(b, "b.json"), gates=["tpot.p50<=2x"], confident=True)
    figure = found["figures"]["tpot.p50"]
    assert (figure["verdict"], figure["interval"], figure["p"]) == ("unknown", None, None)
    assert "measured in two runs without the same dense model" in figure["why"]
    assert figure["ratio"] == pytest.approx(1.2, rel=0.02)
    assert not found["ok"]
    assert "measured in two runs" in found["gates"][0]["why"]
    assert compare(write(a), write(b, "b.json"), gates=["tpot.p50<=2x"])["ok"]


def with_failures(document: dict[str, Any], count: int, *, of: str = "sparse") -> dict[str, Any]:
    """The first requests of each round ran into a limit of 30 s."""
    for one in document["models"][of]["loads"]["concurrency=4"]["rounds"]:
        for request in one["requests"][:count]:
            request |= {"events": [], "tokens": 0, "error": "it did not end its answer within 30 s"}
    return document


@pytest.mark.parametrize("of", ["sparse", "dense"])
def test_a_side_that_fails_most_is_not_faster(of: str, write: Any, halve: Halve) -> None:
    path = write(with_failures(bench(1, tpot=0.01), 6, of=of))
    gates = ("--gate", "tpot.p50<=0.9x", "--gate", "errors<=100", "--gate", "requests_per_second>=0.1x")
    called = halve("compare", path, *gates, "--json")
    assert called.code == 1
    assert called.document["figures"].keys() == {"bytes.disk", "errors"}
    which = "A" if of == "sparse" else "B"
    tpot, errors, rate = called.document["gates"]
    assert tpot["why"] == rate["why"] == f"it is not defined of {which}: 48 of 64 requests failed"
    assert (tpot["holds"], errors["holds"], rate["holds"]) == (False, True, False)
    assert any("48 of 64 requests failed, so there is no ttft.mean" in note for note in called.document["notes"])


def test_a_failure_counts_as_longer_than_all_that_was_answered(write: Any) -> None:
    document = bench(1)
    loads = document["models"]["sparse"]["loads"]["concurrency=4"]["rounds"]
    loads[0]["requests"][0] |= {"events": [], "tokens": 0, "error": "it refused (500)"}
    side, _ = read(write(document))
    answered = [r["events"][0] - r["intended"] for one in loads for r in one["requests"] if r["events"]]
    assert side.figures["ttft.p50"].value == pytest.approx(np.percentile([*answered, 1e9], 50), abs=1e-6)
    assert side.figures["ttft.p90"].value == pytest.approx(np.percentile([*answered, 1e9], 90), abs=1e-6)
    assert side.undefined["ttft.p99"] == side.undefined["ttft.mean"] == "1 of 64 requests failed"
    found = compare(write(document), gates=["ttft.p50<=2x", "ttft.p99<=9x"])
    assert [gate["holds"] for gate in found["gates"]] == [True, False]
    assert found["gates"][0]["why"].endswith("; 1 of 64 requests failed of A")
    assert found["gates"][1]["why"] == "it is not defined of A: 1 of 64 requests failed"


def test_a_round_without_a_figure_is_left_out_of_it(write: Any) -> None:
    """Answers of one token have no time between tokens."""
    document = bench(1)
    for request in document["models"]["sparse"]["loads"]["concurrency=4"]["rounds"][3]["requests"]:
        request |= {"events": request["events"][:1], "tokens": 1}
    figures = compare(write(document))["figures"]
    assert figures["tpot.p50"]["samples"] == [7, 7]
    assert figures["tpot.p50"]["verdict"] == "no difference"
    assert figures["ttft.p50"]["samples"] == [8, 8]


def test_a_round_in_which_nothing_was_good_on_either_side(write: Any) -> None:
    document = bench(1)
    for name, good in (("dense", 1.5), ("sparse", 3.0)):
        for number, one in enumerate(document["models"][name]["loads"]["concurrency=4"]["rounds"]):
            one["figures"]["goodput_per_second"] = 0.0 if number == 3 else good
    found = compare(write(document), gates=["goodput_per_second>=1.5x"])
    assert found["ok"]
    assert found["figures"]["goodput_per_second"]["ratio"] == 2
    for one in document["models"]["dense"]["loads"]["concurrency=4"]["rounds"]:
        one["figures"]["goodput_per_second"] = 0.0
    found = compare(write(document), gates=["goodput_per_second>=1.5x"])
    assert found["gates"][0]["why"] == "the ratio is not defined: the baseline is 0"


def test_the_table_shows_what_only_one_side_has(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("compress.console.out._width", 120)
    document = bench(1, shapes={"concurrency=4": {"requests": REQUESTS, "prompt": 128, "output": 32}})
    dense, sparse = (document["models"][name]["loads"]["concurrency=4"] for name in ("dense", "sparse"))
    del sparse["tpot_seconds"], dense["itl_seconds"]
    sparse["ttft_seconds"] |= {"p90": None, "p99": None}
    sparse |= {"resent": 3, "errors": 2}
    document["speedup"] = {"concurrency=4": {}}
    tables.print_bench(document)
    rows = {
        line.split("│")[1].strip(): line.split("│")[2:5] for line in capsys.readouterr().out.splitlines() if "│" in line
    }
    assert re.search(r"\d / failed / failed", rows["TTFT, ms"][1])
    assert rows["TPOT, ms"][0].strip()
    assert not rows["TPOT, ms"][1].strip()
    assert not rows["ITL, ms"][0].strip()
    assert [cell.strip() for cell in rows["sent again"][:2]] == ["0", "3"]
    assert [cell.strip() for cell in rows["requests that failed"][:2]] == ["0 of 64", "2 of 64"]


def test_tails_need_so_many_requests(write: Any) -> None:
    figures = compare(write(bench(1)))["figures"]
    assert figures["ttft.p90"]["samples"] == [64, 64]
    assert figures["ttft.p90"]["verdict"] == "no difference"
    assert (figures["ttft.p99"]["verdict"], figures["ttft.p99"]["why"]) == ("unknown", "64 samples, and it takes 500")


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
        (
            lambda rounds: rounds[1]["figures"].pop("requests_per_second"),
            r"concurrency=4: requests_per_second is not in every round",
        ),
        (
            lambda rounds: rounds[1]["figures"].update(requests_per_second="many"),
            "requests_per_second is not in every round",
        ),
        (lambda rounds: rounds[1]["requests"][0].update(intended=1e6), "concurrency=4: ttft of a request is less than"),
        (
            lambda rounds: rounds[1]["requests"][2].update(events=["soon"]),
            r"is damaged: rounds\.1\.requests\.2\.events\.0",
        ),
        (lambda rounds: rounds[1]["requests"][2].update(events=[]), "a request that was answered has no tokens"),
    ],
)
def test_what_is_damaged_is_refused(change: Any, told: str, write: Any) -> None:
    with pytest.raises(DocumentError, match=told):
        read(write(damaged(change)))
