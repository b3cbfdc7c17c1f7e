"""`halve compare`: what it says of documents and checkpoints, what it refuses, and what its exit code says."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compress.errors import UsageError
from serve.measure import documents
from serve.measure.compare import compare
from serve.measure.gates import parse
from tests import tiny_models
from tests.runs import Halve, compress


def losses(shift: float = 0.0, *, windows: int = 12, seed: int = 0) -> list[float]:
    """Of windows that differ as texts do; a model that is worse by ``shift`` in each of them, nearly."""
    base = np.random.default_rng(99).normal(3, 0.3, windows)
    return (base + shift + np.random.default_rng(seed).normal(0, 0.002, windows)).tolist()


def evaluation(*models: list[float], **changes: Any) -> dict[str, Any]:
    """What `halve eval --json` writes, as far as it is read."""
    protocol = {
        "text": "wikitext2",
        "length": 2048,
        "windows": len(models[0]),
        "tokens_sha256": "ab",
        "loss": "float32",
    }
    names = ["dense", "sparse"][-len(models) :]
    return {
        "kind": "eval",
        "through": "process",
        "protocol": {**protocol, **changes.pop("protocol", {})},
        "models": [
            {"directory": name, "dtype": "bfloat16", "losses": own} for name, own in zip(names, models, strict=True)
        ],
        "environment": {},
        **changes,
    }


def bench(seed: int, *, rounds: int = 30, tpot: float = 0.02, **load: Any) -> dict[str, Any]:
    generator = np.random.default_rng(seed)

    def times(middle: float) -> dict[str, Any]:
        samples = (middle * np.exp(generator.normal(0, 0.01, rounds))).tolist()
        return {"median": float(np.median(samples)), "samples": samples}

    return {
        "kind": "bench",
        "load": {"prompt": 128, "output": 32, "batch": 1, "rounds": rounds, **load},
        "environment": {"machine": "a machine", "threads": 2},
        "models": {
            name: {
                "directory": name, "weights_sha256": name, "ttft_seconds": times(0.5), "tpot_seconds": times(middle),
                "bytes": {"disk": size, "weights": size, "pruned_layers": 0 if name == "dense" else 9},
            }
            for name, middle, size in (("dense", 0.03, 200), ("sparse", tpot, 120))
        },
    }  # fmt: skip


@pytest.fixture
def write(tmp_path: Path):
    """Writes documents to files."""

    def to_file(document: Any, name: str = "a.json") -> Path:
        path = tmp_path / name
        path.write_text(document if isinstance(document, str) else json.dumps(document))
        return path

    return to_file


def test_perplexities_of_the_same_windows_are_paired(write) -> None:
    a, b = write(evaluation(losses(0.05, seed=1))), write(evaluation(losses(0, seed=2)), "b.json")
    found = compare(a, b)["figures"]["perplexity"]
    assert found["paired"]
    assert found["a"] == pytest.approx(np.exp(np.mean(losses(0.05, seed=1))))
    assert found["ratio"] == pytest.approx(np.exp(0.05), rel=2e-3)
    assert found["interval"][0] < np.exp(0.05) < found["interval"][1]
    assert found["interval"][1] - found["interval"][0] < 0.01
    assert found["verdict"] == "worse"
    assert compare(b, a)["figures"]["perplexity"]["verdict"] == "better"
    same = compare(write(evaluation(losses(0, seed=3)), "c.json"), b)["figures"]["perplexity"]
    assert same["verdict"] == "no difference"


def test_one_document_has_its_own_baseline(write) -> None:
    agreement = {"top1": {"value": 0.8, "samples": [0.8] * 12}, "kl": {"value": 0.1, "samples": [0.1] * 12}}
    document = compare(write(evaluation(losses(0, seed=1), losses(0.2, seed=2), agreement=agreement)))
    assert document["a"]["name"].startswith("sparse")
    assert document["b"]["name"].startswith("dense")
    assert document["figures"]["perplexity"]["verdict"] == "worse"
    assert any("agreement.top1, agreement.kl" in note for note in document["notes"])
    with pytest.raises(UsageError, match="holds one model; name the baseline"):
        compare(write(evaluation(losses())))


def test_rounds_of_two_runs_are_not_paired(write) -> None:
    a, b = write(bench(1, tpot=0.021)), write(bench(2, tpot=0.02), "b.json")
    document = compare(a, b)
    found = document["figures"]["tpot.p50"]
    samples = [
        bench(seed, tpot=t)["models"]["sparse"]["tpot_seconds"]["samples"] for seed, t in ((1, 0.021), (2, 0.02))
    ]
    assert (found["a"], found["b"]) == tuple(np.median(s) for s in samples)
    assert not found["paired"]
    assert found["relative_to"] == "dense"  # which both measured, each on its day
    assert found["ratio"] == pytest.approx(1.05, abs=0.01)
    assert found["verdict"] == "worse"
    assert found["interval"][0] > 1.03
    assert document["figures"]["ttft.mean"]["verdict"] == "no difference"
    assert document["figures"]["tpot.p99"]["verdict"] == "unknown"
    assert document["figures"]["tpot.p99"]["why"] == "30 samples, and it takes 500"
    assert document["figures"]["bytes.disk"]["verdict"] == "equal"
    own = compare(a)["figures"]
    assert own["tpot.p50"]["paired"]
    assert own["tpot.p50"]["verdict"] == "better"
    assert own["bytes.weights"]["ratio"] == 0.6
    assert own["bytes.pruned_layers"]["ratio"] is None  # the dense model has none


def test_rates_are_better_high(write) -> None:
    faster, slower = bench(1), bench(1)
    for document, factor in ((faster, 1.2), (slower, 1.0)):
        for name, times in (("sparse", factor), ("dense", 1.0)):
            rates = [times / sample for sample in document["models"][name]["tpot_seconds"]["samples"]]
            document["models"][name]["throughput"] = {"tokens_per_second": {"samples": rates}}
    figures = compare(write(faster), write(slower, "b.json"))["figures"]
    assert figures["throughput.tokens_per_second.p50"]["verdict"] == "better"
    assert figures["throughput.tokens_per_second.p50"]["ratio"] == pytest.approx(1.2)


def test_what_differs_beside_the_model_is_told(write) -> None:
    other = bench(2)
    other["environment"]["machine"] = "another machine"
    notes = compare(write(bench(1)), write(other, "b.json"))["notes"]
    assert notes[0] == "machine: a machine against another machine"
    assert len(notes) == 2
    assert notes[1].startswith("two runs: A / B of times and rates is of sparse / dense in one")


TASK = {
    "version": 1.0, "few_shot": 0, "examples": 200, "sha256": "cd",
    "metrics": {"acc": {"value": 0.5, "better": "higher", "statistic": "mean", "samples": [0.0, 1.0] * 100},
                "f1": {"value": 0.5, "better": "higher"}},
}  # fmt: skip


def with_task(**changes: Any) -> dict[str, Any]:
    document = evaluation(losses())
    document["models"][0]["tasks"] = {"arc_easy": {**TASK, **changes}}
    return document


def test_tasks_are_paired_by_example(write) -> None:
    better = with_task()
    samples = [1.0 if index % 10 == 0 else value for index, value in enumerate(TASK["metrics"]["acc"]["samples"])]
    better["models"][0]["tasks"]["arc_easy"] = {
        **TASK, "metrics": {"acc": {**TASK["metrics"]["acc"], "value": 0.6, "samples": samples}}
    }  # fmt: skip
    figures = compare(write(better), write(with_task(), "b.json"))["figures"]
    assert figures["arc_easy.acc"]["ratio"] == pytest.approx(1.2)
    assert figures["arc_easy.acc"]["verdict"] == "better"
    assert figures["arc_easy.acc"]["paired"]
    figures = compare(write(with_task()), write(with_task(), "b.json"))["figures"]
    assert figures["arc_easy.acc"]["verdict"] == "no difference"
    assert (figures["arc_easy.f1"]["verdict"], figures["arc_easy.f1"]["why"]) == ("unknown", "no samples were kept")


@pytest.mark.parametrize(
    ("a", "b", "told"),
    [
        (evaluation(losses()), evaluation(losses(), protocol={"length": 512}), "text: length 2048 against 512"),
        (evaluation(losses()), evaluation(losses(windows=9)), "windows 12 against 9"),
        (evaluation(losses()), evaluation(losses(), protocol={"tokens_sha256": "x"}), "tokens_sha256 'ab' against 'x'"),
        (bench(1), bench(1, batch=4), "load: batch 1 against 4"),
        (with_task(), with_task(examples=100), "arc_easy: examples 200 against 100"),
        (with_task(), with_task(few_shot=5), "arc_easy: few_shot 0 against 5"),
        (evaluation(losses()), bench(1), "of kind 'eval' and .* of kind 'bench'"),
    ],
)  # fmt: skip
def test_protocols_that_differ_are_refused(a: Any, b: Any, told: str, write, halve: Halve) -> None:
    called = halve("compare", write(a), write(b, "b.json"))
    assert called.code == 2
    assert re.search(told, called.message), called.message


DAMAGED = evaluation(losses())
DAMAGED["models"][0]["losses"][3] = "much"
INFINITE = json.dumps(evaluation(losses())).replace(str(losses()[0]), "NaN")
NO_TIMES = bench(1)
NO_TIMES["models"]["sparse"]["tpot_seconds"]["samples"] = []
NEGATIVE = bench(1)
NEGATIVE["models"]["sparse"]["ttft_seconds"]["samples"][0] = -1


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "is not whole, or not JSON"),
        (json.dumps(evaluation(losses()))[:-40], "is not whole, or not JSON"),
        ("\x00\x01", "is not whole, or not JSON"),
        ("[" * 100_000, "holds something else"),
        ("[1, 2]", "holds something else"),
        ('{"results": {}}', "holds something else"),
        ('{"kind": "methods"}', "a document of kind 'methods'"),
        ('{"kind": ["eval"]}', "holds something else"),
        ({"kind": "eval", "models": []}, "is damaged: models"),
        ({"kind": "eval"}, "is damaged: models"),
        (DAMAGED, r"is damaged: models\.0\.losses\.3"),
        (INFINITE, r"is damaged: models\.0\.losses\.0"),
        ({"kind": "bench", "load": {}, "models": {"sparse": {}}}, "no figures of the model 'sparse'"),
        (NO_TIMES, "the samples of tpot are not positive"),
        (NEGATIVE, "the samples of ttft are not positive"),
    ],
)  # fmt: skip
def test_what_is_no_result_is_refused(content: Any, told: str, write, halve: Halve) -> None:
    called = halve("compare", write(content), write(evaluation(losses()), "b.json"))
    assert called.code == 2
    assert re.search(told, called.message), called.message


def test_files_that_are_not_there(halve: Halve, tmp_path: Path, write) -> None:
    assert "there is no file" in halve("compare", tmp_path / "x.json", tmp_path / "y.json").message
    (tmp_path / "empty").mkdir()
    called = halve("compare", tmp_path / "empty", write(evaluation(losses())))
    assert called.code == 2
    assert "is empty; a model is a directory" in called.message
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe{}\x80")
    assert "is not whole" in halve("compare", tmp_path / "binary.json", write(evaluation(losses()))).message


def test_checkpoints(halve: Halve, tmp_path: Path) -> None:
    source = tiny_models.build("llama", tmp_path / "source", layers=1)
    one = compress(source, tmp_path / "one", metric="magnitude", reconstruction="none").directory
    two = compress(source, tmp_path / "two", metric="wanda", reconstruction="none").directory
    document = halve(
        "compare", two, one, "--gate", "bytes.weights<=1.0x", "--gate", "error.mean<=1x", "--json"
    ).document
    report = {path: json.loads((path / "report.json").read_text()) for path in (one, two)}
    figures = document["figures"]
    assert figures["error.mean"]["a"] == pytest.approx(report[two]["summary"]["mean_relative_output_error"])
    assert figures["error.worst"]["b"] == max(layer["relative_output_error"] for layer in report[one]["layers"])
    assert figures["bytes.disk"]["a"] == sum(f.stat().st_size for f in two.rglob("*") if f.is_file())
    assert figures["error.mean"]["verdict"] == "better"
    assert figures["bytes.pruned_layers"]["verdict"] == "equal"
    assert "metric: wanda against magnitude" in document["notes"]
    assert document["ok"]
    dense = halve("compare", two, source, "--gate", "bytes.weights<=0.5x", "--json")
    assert dense.code == 1
    assert dense.document["figures"].keys() == {"bytes.disk", "bytes.weights"}
    shutil.rmtree(two / "report.json", ignore_errors=True)
    (two / "report.json").write_text("{}]")
    assert "report.json is not JSON" in halve("compare", two, one).message


def test_gates_give_the_exit_code(halve: Halve, write) -> None:
    a, b = write(evaluation(losses(0.05, seed=1))), write(evaluation(losses(0, seed=2)), "b.json")
    held = halve("compare", a, b, "--gate", "perplexity<=1.10x", "--gate", "perplexity >= 1", "--json")
    assert held.code == 0
    assert [gate["holds"] for gate in held.document["gates"]] == [True, True]
    failed = halve("compare", a, b, "--gate", "perplexity<=1.10x", "--gate", "perplexity<=1.01x", "--json")
    assert failed.code == 1
    assert [gate["holds"] for gate in failed.document["gates"]] == [True, False]
    assert not failed.document["ok"]
    human = halve("compare", a, b, "--gate", "perplexity<=1.01x")
    assert human.code == 1
    assert "gate perplexity<=1.01x: fails (1.05" in human.stdout


@pytest.mark.parametrize(
    ("name", "better"),
    [
        ("bytes.kv_cache", "higher"),
        ("bytes.weights", "lower"),
        ("tpot", "lower"),
        ("output_tokens_per_second", "higher"),
    ],
)
def test_what_is_better(name: str, better: str) -> None:
    """More room for keys and values is what smaller weights are for."""
    assert documents._better(name) == better


def test_confident_without_a_gate_is_refused(halve: Halve, write) -> None:
    called = halve("compare", "a.json", "b.json", "--confident")
    assert called.code == 2
    assert "--confident is for --gate" in called.message


def test_confident_gates_look_at_the_interval(halve: Halve, write) -> None:
    a, b = write(evaluation(losses(0.05, seed=1))), write(evaluation(losses(0, seed=2)), "b.json")
    found = compare(a, b)["figures"]["perplexity"]
    low, high = found["interval"]
    between = (found["ratio"] + high) / 2
    assert halve("compare", a, b, "--gate", f"perplexity<={between}x").code == 0
    assert halve("compare", a, b, "--gate", f"perplexity<={between}x", "--confident").code == 1
    assert halve("compare", a, b, "--gate", f"perplexity<={high}x", "--confident").code == 0
    assert halve("compare", a, b, "--gate", f"perplexity>={(low + found['ratio']) / 2}x", "--confident").code == 1
    value = found["a"]
    absolute = halve("compare", a, b, "--gate", f"perplexity<={value}", "--confident", "--json")
    assert absolute.code == 1
    own_low, own_high = absolute.document["gates"][0]["interval"]
    assert own_low < value < own_high
    assert halve("compare", a, b, "--gate", f"perplexity<={own_high}", "--confident").code == 0
    few = write(bench(1, rounds=5), "few.json")
    assert halve("compare", few, "--gate", "tpot.p50<=0.9x").code == 0
    called = halve("compare", few, "--gate", "tpot.p50<=0.9x", "--gate", "bytes.disk<=0.6x", "--confident", "--json")
    assert called.code == 1
    assert [gate["holds"] for gate in called.document["gates"]] == [False, True]
    assert "its interval is not known" in called.document["gates"][0]["why"]


def test_a_ratio_that_is_not_defined_fails_its_gate(halve: Halve, write) -> None:
    called = halve("compare", write(bench(1)), "--gate", "bytes.pruned_layers<=1x", "--json")
    assert called.code == 1
    assert called.document["gates"][0]["why"] == "the ratio is not defined: the baseline is 0"


@pytest.mark.parametrize(
    "gate",
    ["", "perplexity", "perplexity<1", "perplexity==1", "perplexity<=", "perplexity<=x", "<=1.1x", "perplexity<=nan",
     "perplexity<=inf", "perplexity<=1.1xx", "perplexity<=1,1x", "perplexity<=1<=2", "perplexity=<1", "a b<=1"],
)  # fmt: skip
def test_gates_that_cannot_be_read(gate: str, halve: Halve, write) -> None:
    called = halve("compare", write(evaluation(losses(), losses())), "--gate", gate)
    assert called.code == 2
    assert f"--gate {gate!r} is not FIGURE<=LIMIT" in called.message


def test_gates_of_unknown_figures(halve: Halve, write) -> None:
    called = halve("compare", write(evaluation(losses(), losses())), "--gate", "perplexty<=1.1x")
    assert called.code == 2
    assert "has no figure 'perplexty'; did you mean 'perplexity'? (known: perplexity)" in called.message
    called = halve("compare", write(bench(1)), "--gate", "tpot.p95<=0.02")
    assert "tpot.p50, tpot.p90, tpot.p99" in called.message


def test_what_gates_say() -> None:
    gate = parse(" tpot.p50 >= -1e-3 x ")
    assert (gate.figure, gate.sign, gate.limit, gate.ratio) == ("tpot.p50", ">=", -0.001, True)
    assert parse("arc_easy.acc_norm<=0.5").ratio is False
    assert parse("perplexity<=1.1x").judge(1.1, None, confident=False)[0]  # the limit itself is inside
    assert not parse("perplexity<=1.1x").judge(1.1000001, None, confident=False)[0]


def test_nothing_in_common_is_refused(halve: Halve, write) -> None:
    only_tasks = with_task()
    del only_tasks["models"][0]["losses"], only_tasks["protocol"]
    called = halve("compare", write(only_tasks), write(evaluation(losses()), "b.json"))
    assert called.code == 2
    assert "have no figure in common: arc_easy.acc, arc_easy.f1 against perplexity" in called.message


def test_people_see_it_all(halve: Halve, write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    called = halve("compare", write(bench(1)), "--gate", "tpot.p50<=0.80x")
    assert called.code == 0
    for said in ("A: sparse", "B: dense", "tpot.p50", "better", "unknown: ", "500", "gate tpot.p50<=0.80x: holds"):
        assert said in called.stdout
