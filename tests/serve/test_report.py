"""`halve report`: the page says what the documents say and nothing else, and the model card keeps what a person wrote."""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.artefact import read_report
from compress.convert import pack_checkpoint, unpack_checkpoint
from compress.errors import OutputError
from compress.files import seal
from serve.measure.compare import compare
from serve.measure.documents import Side
from serve.measure.report import card, summary
from serve.measure.report import checkpoint as checkpoints
from serve.measure.report.checkpoint import Checkpoint, Layer
from serve.measure.report.page import Page
from serve.measure.report.results import Result, belongs
from serve.measure.report.summary import Row, Run
from tests import tiny_models
from tests.runs import Halve, compress, tree
from tests.serve.report_documents import Element, Measured, endpoint_bench, read_page


@pytest.fixture
def own(made: Measured, tmp_path: Path) -> Measured:
    """The same with a pruned checkpoint that a test may change; results know it by the digest of its weights."""
    return replace(made, sparse=Path(shutil.copytree(made.sparse, tmp_path / "sparse")))


def section(page: Element, name: str) -> Element:
    [found] = page.all("section", id=name)
    return found


def write(path: Path, document: Any) -> Path:
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


def test_the_numbers_are_those_of_the_documents(halve: Halve, own: Measured, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    called = halve("report", own.sparse, "--results", own.evaluation, "--results", own.bench, "--out", out, "--json")
    assert (called.code, called.stderr) == (0, "")
    page = read_page(out)
    bench, evaluation = json.loads(own.bench.read_text()), json.loads(own.evaluation.read_text())
    against = compare(own.bench)["figures"]

    speed = section(page, "speed").rows()
    for key, label in (("ttft", "time to first token"), ("tpot", "time per output token")):
        dense, sparse = (np.array(bench["models"][m][f"{key}_seconds"]["samples"]) for m in ("dense", "sparse"))
        shown = speed[label]
        assert shown[:3] == pytest.approx(
            [np.median(dense), np.median(sparse), 1 / np.median(sparse / dense)], rel=1e-12
        )
        assert shown[1] == pytest.approx(bench["models"]["sparse"][f"{key}_seconds"]["median"], rel=1e-12)
        low, high = against[f"{key}.p50"]["interval"]
        assert f"{1 / high:.2f} to {1 / low:.2f}" in section(page, "speed").text

    accuracy = section(page, "accuracy").rows()
    losses = [model["losses"] for model in evaluation["models"]]
    perplexities = [float(np.exp(np.mean(own_losses))) for own_losses in losses]
    [row] = [values for label, values in accuracy.items() if label.startswith("perplexity")]
    assert row == pytest.approx([*perplexities, perplexities[1] / perplexities[0]], rel=1e-12)
    assert "{:.3f} to {:.3f}".format(*evaluation["ratio_interval"]) in section(page, "accuracy").text
    top1 = accuracy["same likeliest token as dense"]
    assert top1 == pytest.approx([evaluation["agreement"]["top1"]["value"]], rel=1e-12)

    memory = section(page, "memory").rows()
    sizes = {name: model["bytes"] for name, model in bench["models"].items()}
    pruned, rest = memory["sparse"]
    assert (pruned, pruned + rest) == (sizes["sparse"]["pruned_layers"], sizes["sparse"]["weights"])
    assert sum(memory["dense"]) == sizes["dense"]["weights"]
    assert memory["files on disk"][:2] == [sizes["dense"]["disk"], sizes["sparse"]["disk"]]
    assert memory["weights in memory"][2] == bench["bytes_ratio"]["weights"]

    headline = [tile.values for tile in page.all("ul", **{"class": "headline"})[0].all("li")]
    assert headline[0][0] == speed["time per output token"][2]
    assert headline[1][0] == speed["time to first token"][2]
    assert headline[2][0] == bench["bytes_ratio"]["weights"]
    assert headline[3][0] == pytest.approx(perplexities[1] / perplexities[0])
    kernels = section(page, "speed").text
    for used in bench["backends"]:
        assert used["reason"] in kernels
    assert bench["environment"]["machine"] in section(page, "reproduce").text

    document = called.document
    assert document["not_measured"].keys() == {"latency against concurrency", "tasks"}
    assert document["out"] == str(out)
    assert document["bytes"] == out.stat().st_size < 300_000
    figures = {figure["figure"]: figure for figure in document["figures"]}
    assert figures["perplexity"]["value"] == pytest.approx(perplexities[1])


def test_the_layers_are_those_of_the_report(halve: Halve, own: Measured, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    assert halve("report", own.sparse, "--out", out).code == 0
    report = read_report(own.sparse)
    assert report is not None
    page = section(read_page(out), "layers")
    [every] = page.all("details")
    rows = every.rows()
    pictures = page.all("svg")
    assert len(pictures) == 2  # wide and narrow
    titles = [title.text for title in pictures[0].all("title")]
    dense = 0
    for layer in report["layers"]:
        name, error = layer["name"], layer.get("relative_output_error")
        label = name if error is not None else f"{name}dense: {layer['reason']}"
        assert rows[label] == [layer["bytes_before"], layer["bytes_after"], *([] if error is None else [error])]
        assert f"{name}: {error:.3g}" in titles if error is not None else f"{name}: dense, {layer['reason']}" in titles
        dense += error is None
    assert dense == 3
    assert f"{len(report['layers']) - dense} of {len(report['layers'])} linear layers" in page.text
    [reason] = {layer["reason"] for layer in report["layers"] if "reason" in layer}
    assert [values for label, values in page.rows().items() if label.startswith(reason)] == [[3.0]]
    of_kind = [layer["relative_output_error"] for layer in report["layers"] if layer["name"].endswith("o_proj")]
    assert page.rows()["self_attn.o_proj"] == [3, 3, pytest.approx(np.mean(of_kind)), max(of_kind)]
    assert page.rows()["self_attn.k_proj"] == [0, 3]


def test_what_was_not_measured_is_said_with_its_command(halve: Halve, own: Measured, tmp_path: Path) -> None:
    before = (own.sparse / "README.md").read_bytes()
    out = tmp_path / "report.html"
    document = halve("report", own.sparse, "--out", out, "--json").document
    page = read_page(out)
    for name in ("speed", "accuracy"):
        assert section(page, name).values == []
        assert "not measured" in section(page, name).text
    assert len(page.all("span", **{"class": "big missing"})) == 3
    assert document["not_measured"]["perplexity"] == f"halve eval {own.sparse} --against {own.dense} --json > eval.json"
    assert document["not_measured"]["perplexity"] in section(page, "accuracy").text
    assert (
        f"halve bench {own.sparse} --against {own.dense} --concurrency 1,4,16 --json > bench.json"
        in section(page, "speed").text
    )
    assert "were not measured" in page.all("p", **{"class": "verdict"})[0].text
    report = read_report(own.sparse)
    assert report is not None
    memory = section(page, "memory").rows()
    stored = [report["bytes"]["packed_values"] + report["bytes"]["packed_masks"], report["bytes"]["dense"]]
    assert memory["sparse"] == stored
    assert memory["dense"] == [report["summary"]["pruned_bytes_before"], report["bytes"]["dense"]]
    assert document["card"] is None
    assert (own.sparse / "README.md").read_bytes() == before
    human = halve("report", own.sparse, "--out", tmp_path / "second.html")
    assert "not measured: perplexity; run halve eval" in human.stdout


def test_loads(halve: Halve, own: Measured, tmp_path: Path) -> None:
    labels = ("concurrency=1", "concurrency=4", "rate=0.5", "trace")
    document = endpoint_bench(own.dense, own.sparse, labels)
    document["complete"] = False
    out = tmp_path / "report.html"
    bench = write(tmp_path / "load.json", document)
    assert halve("report", own.sparse, "--results", bench, "--out", out).code == 0
    page = read_page(out)
    speed = section(page, "speed")
    found = {}
    for row in speed.all("details")[0].all("tr")[1:]:
        cells = row.all("td")
        found[tuple(cell.text for cell in cells[:3])] = [cell.values for cell in cells[3:7]]
    for label in labels:
        for side in ("dense", "sparse"):
            load = document["models"][side]["loads"][label]
            for key, said in (("ttft_seconds", "time to first token"), ("tpot_seconds", "time per output token")):
                errors = f" {load['errors']} errors" if load["errors"] else ""
                shown = found[label, said, side + errors]
                expected = [load[key][statistic] for statistic in ("mean", "p50", "p90", "p99")]
                defined = [[] if value is None else [pytest.approx(value, rel=1e-12)] for value in expected]
                assert shown == defined
    titles = [picture.all("title")[0].text for picture in speed.all("svg")]
    assert titles == ["Time to first token", "Time per output token", "Output tokens a second"]
    drawn = speed.all("svg")[1].all("desc")[0].text
    for label in labels[:2]:
        middle = document["models"]["sparse"]["loads"][label]["tpot_seconds"]["p50"]
        assert f"{label} {middle * 1e3:.3g} ms" in drawn
    assert "concurrency=1" in page.all("ul", **{"class": "headline"})[0].text
    assert "cut off before its end" in section(page, "reproduce").text
    memory = section(page, "memory").rows()
    assert memory["sparse"][2] == 300_000
    assert memory["KV cache"][:2] == [300_000, 300_000]
    assert "not measured" not in section(page, "memory").text


def section_of_card(own: Measured) -> str:
    return (own.sparse / "README.md").read_text().partition(card.BEGIN)[2]


def test_benches_of_different_files_are_not_one_curve(halve: Halve, own: Measured, tmp_path: Path) -> None:
    """Of other prompts, and with a load in common: both are there, each by itself, and the page says which is at the top."""
    first = endpoint_bench(own.dense, own.sparse)
    second = endpoint_bench(own.dense, own.sparse, ("concurrency=4", "concurrency=8"))
    for shape in second["load"]["shapes"].values():
        shape["prompt"] = 2048
    files = [write(tmp_path / name, document) for name, document in (("a.json", first), ("b.json", second))]
    out = tmp_path / "report.html"
    called = halve("report", own.sparse, "--results", files[0], "--results", files[1], "--out", out, "--json")
    assert called.code == 0, called.stderr
    page = read_page(out)
    speed = section(page, "speed")
    drawn = [picture.all("desc")[0].text for picture in speed.all("svg")]
    assert len(drawn) == 6  # three of each file
    for text in drawn:
        assert ("concurrency=1" in text) != ("concurrency=8" in text)
        assert "concurrency=4" in text
    shown: dict[str, float] = {}
    for row in speed.all("details")[0].all("tr")[1:]:
        cells = row.all("td")
        if cells[1].text == "time per output token" and cells[2].text.startswith("sparse"):
            [shown[cells[0].text]] = cells[4].values
    assert shown == pytest.approx(
        {
            f"{label}{file}": document["models"]["sparse"]["loads"][label]["tpot_seconds"]["p50"]
            for file, document in zip(files, (first, second), strict=True)
            for label in document["load"]["levels"]
        }
    )
    [note] = [note for note in called.document["notes"] if "another bench" in note]
    assert note.startswith(f"{files[1]} holds another bench (transformers, prompt of 2048, 4 tokens out, 8 rounds")
    assert str(files[0]) in note
    assert note in page.text


def test_the_lightest_load_is_at_the_top(halve: Halve, own: Measured, tmp_path: Path) -> None:
    document = endpoint_bench(own.dense, own.sparse, ("rate=2", "concurrency=16", "concurrency=4"))
    bench = write(tmp_path / "load.json", document)
    called = halve("report", own.sparse, "--results", bench, "--out", tmp_path / "report.html", "--json")
    [figure] = [f for f in called.document["figures"] if f["figure"] == "time per output token"]
    assert figure["load"].endswith("concurrency=4")
    assert figure["value"] == pytest.approx(
        document["models"]["sparse"]["loads"]["concurrency=4"]["tpot_seconds"]["p50"], rel=0.1
    )


def test_a_bench_that_was_cut_off_shows_no_more_than_it_has(halve: Halve, own: Measured, tmp_path: Path) -> None:
    """Two of eight rounds, of an endpoint whose engine is not known."""
    document = endpoint_bench(own.dense, own.sparse, ("concurrency=1",))
    document |= {"complete": False, "rounds_done": 2}
    document["load"]["engine"] = None
    for model in document["models"].values():
        for load in model["loads"].values():
            load["rounds"] = load["rounds"][:2]
    out = tmp_path / "report.html"
    assert halve("report", own.sparse, "--results", write(tmp_path / "load.json", document), "--out", out).code == 0
    page = read_page(out)
    for text in (page.text, section_of_card(own)):
        assert "2 of 8 rounds (interrupted)" in text
        assert "None" not in text
    verdict = page.all("p", **{"class": "verdict"})[0].text
    assert "which does not show a difference yet (2 samples, and it takes" in verdict


def test_requests_that_failed_are_told_wherever_their_times_are(halve: Halve, own: Measured, tmp_path: Path) -> None:
    document = endpoint_bench(own.dense, own.sparse, ("concurrency=1",))
    document["models"]["sparse"]["loads"]["concurrency=1"]["errors"] = 7
    out = tmp_path / "report.html"
    assert halve("report", own.sparse, "--results", write(tmp_path / "load.json", document), "--out", out).code == 0
    page = read_page(out)
    told = "7 of 160 requests failed, and 0 of 160 of the dense model's"
    verdict = page.all("p", **{"class": "verdict"})[0].text
    assert verdict.startswith(f"{told}; it decodes")
    tiles = page.all("ul", **{"class": "headline"})[0].all("li")
    assert [told in tile.text for tile in tiles] == [True, True, False, False]
    assert not page.all("ul", **{"class": "headline"})[0].all("span", **{"class": "big better"})[
        1:
    ]  # the weights' alone
    lines = [line for line in section_of_card(own).splitlines() if line.startswith("| time")]
    assert [told in line for line in lines] == [True, True]


@pytest.mark.parametrize("place", ["serve.measure.report.report", "serve.measure.report.card"])
def test_card_and_page_are_written_both_or_neither(
    place: str, halve: Halve, own: Measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, text: str) -> None:
        raise OutputError(f"no disk space left while writing {path}")

    before = tree(own.sparse)
    monkeypatch.setattr(sys.modules[place], "write_text", full)  # (the package's ``report`` is the function)
    out = tmp_path / "report.html"
    called = halve("report", own.sparse, "--results", own.evaluation, "--out", out)
    assert (called.code, "no disk space left" in called.message) == (2, True)
    assert tree(own.sparse) == before
    assert not out.exists()


def test_names_and_paths_are_escaped(halve: Halve, own: Measured, tmp_path: Path) -> None:
    """Whatever stands in a layer's name, a reason or a path is text on the page and in the card."""
    bad = "<script>alert(1)</script>"
    report = json.loads((own.sparse / "report.json").read_text())
    report["name"] = bad
    report["warnings"] = [f"{bad} warns"]
    report["layers"][0]["name"] = f"model.layers.0.{bad}$_x$"
    dense = next(layer for layer in report["layers"] if layer["status"] == "dense")
    dense["reason"] = '"><img src=x onerror=alert(1)> & $\\frac$'
    write(own.sparse / "report.json", report)
    evaluation = json.loads(own.evaluation.read_text())
    evaluation["protocol"]["text"] = f"| {bad} `x` |"
    bench = json.loads(own.bench.read_text())
    bench["backends"][0]["reason"] = bad
    bench["environment"]["machine"] = "<b>machine</b>"
    folder = tmp_path / "a <i>b"
    folder.mkdir()
    out = folder / "report.html"
    given_results = [write(folder / "eval.json", evaluation), write(folder / "bench.json", bench)]
    called = halve("report", own.sparse, "--results", given_results[0], "--results", given_results[1], "--out", out)
    assert called.code == 0
    page = read_page(out)
    assert not page.all("script") + page.all("img") + page.all("b") + page.all("i", onerror="alert(1)")
    assert not [e for e in page.all() if any(name.startswith("on") for name in e.attributes)]
    assert page.all("h1")[0].text == bad
    assert dense["reason"] in page.text
    assert any(bad in title.text for title in page.all("svg")[-1].all("title"))
    assert "<b>machine</b>" in page.text
    text = (own.sparse / "README.md").read_text()
    [line] = [line for line in text.splitlines() if line.startswith("| perplexity")]
    assert "<script>" not in text.partition(card.BEGIN)[2]
    assert len(re.findall(r"(?<!\\)\|", line)) == 5


def test_nothing_of_the_page_comes_from_elsewhere(halve: Halve, own: Measured, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    bench = write(tmp_path / "load.json", endpoint_bench(own.dense, own.sparse))
    results = ["--results", own.evaluation, "--results", own.bench, "--results", bench]
    assert halve("report", own.sparse, *results, "--out", out).code == 0
    page, text = read_page(out), out.read_text()
    ids = [element.attributes["id"] for element in page.all() if "id" in element.attributes]
    assert len(ids) == len(set(ids))
    references = []
    for element in page.all():
        for name, value in element.attributes.items():
            assert not name.startswith("xmlns")
            if name in ("src", "href", "srcset", "data", "poster", "action", "xlink:href"):
                references.append(value)
    references += re.findall(r"url\(([^)]*)\)", text)
    assert references
    assert {reference.strip("\"'") for reference in references} <= {f"#{name}" for name in ids}
    assert "@import" not in text
    assert not re.search(r"https?://", text)
    assert not page.all("script") + page.all("link") + page.all("iframe") + page.all("object")
    [policy] = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert policy.attributes["content"] == "default-src 'none'; style-src 'unsafe-inline'"
    assert page.all("svg")
    for picture in page.all("svg"):
        named = picture.attributes["aria-labelledby"].split()
        title, description = [child for child in picture.children if isinstance(child, Element)][:2]
        assert [(title.tag, title.attributes["id"]), (description.tag, description.attributes["id"])] == [
            ("title", named[0]), ("desc", named[1]),
        ]  # fmt: skip
        assert title.text
        assert description.text
        assert not re.search(r"#[0-9a-f]{6}", json.dumps([element.attributes for element in picture.all()]))


def test_colours_can_be_read() -> None:
    """WCAG 2.2: letters at 4.5 to 1 on both grounds, shapes that carry meaning at 3 to 1, in light and dark."""
    css = (Path(summary.__file__).parent / "template" / "report.css").read_text()
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", part)) for part in css.split("@media (prefers-color", 1)
    )
    assert light.keys() == dark.keys()

    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    def contrast(a: str, b: str) -> float:
        high, low = sorted((luminance(a), luminance(b)), reverse=True)
        return (high + 0.05) / (low + 0.05)

    for theme in (light, dark):
        for ground in ("paper", "panel"):
            for letters in ("ink", "muted", "accent", "bad"):
                assert contrast(theme[letters], theme[ground]) >= 4.5, (letters, ground)
        assert contrast(theme["dense"], theme["paper"]) >= 3
        assert contrast(theme["paper"], theme["accent"]) >= 4.5
        steps = [luminance(theme[f"heat-{step}"]) for step in range(9)]
        assert steps == sorted(steps, reverse=theme is light)


@pytest.mark.parametrize(
    ("document", "told"),
    [
        ("{", "is not whole, or not JSON"),
        ({"kind": "compare"}, "holds a document of kind 'compare'; `halve report` reads"),
        ({"kind": "advice"}, "holds a document of kind 'advice'"),
        ({"kind": "eval", "models": []}, "is damaged: models"),
        ({"kind": "bench", "load": {}, "models": {"model": {"tpot_seconds": {"samples": [0]}}}}, "not positive numbers"),
        ([], "holds something else"),
    ],
)  # fmt: skip
def test_results_that_cannot_be_used(document: Any, told: str, halve: Halve, own: Measured, tmp_path: Path) -> None:
    before = tree(own.sparse)
    out = tmp_path / "report.html"
    called = halve("report", own.sparse, "--results", write(tmp_path / "r.json", document), "--out", out)
    assert called.code == 2
    assert told in called.message
    assert not out.exists()
    assert tree(own.sparse) == before
    missing = halve("report", own.sparse, "--results", tmp_path / "none.json", "--out", out)
    assert (missing.code, "there is no file" in missing.message) == (2, True)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda r: r["layers"][1].pop("bytes_before"), "is damaged: layers.1.bytes_before"),
        (lambda r: r["layers"][2].update(relative_output_error=float("nan")), "is damaged: layers.2.relative_output_error"),
        (lambda r: r["layers"][2].update(status="gone"), "is damaged: layers.2.status"),
        (lambda r: r["layers"][2].update(shape="wide"), "is damaged: layers.2.shape"),
        (lambda r: r.update(layers=[1]), "is not a report of halve"),
        (lambda r: r.pop("summary"), "is damaged: summary"),
    ],
)  # fmt: skip
def test_damaged_reports(change: Any, told: str, halve: Halve, own: Measured, tmp_path: Path) -> None:
    report = json.loads((own.sparse / "report.json").read_text())
    change(report)
    write(own.sparse / "report.json", report)
    called = halve("report", own.sparse, "--out", tmp_path / "report.html")
    assert called.code == 1
    assert told in called.stderr
    assert "Traceback" not in called.stderr
    assert not (tmp_path / "report.html").exists()


def test_other_damaged_files(halve: Halve, own: Measured, tmp_path: Path) -> None:
    write(own.sparse / "recipe.yaml", "recipe: [1, 2]\n")
    called = halve("report", own.sparse, "--out", tmp_path / "report.html")
    assert (called.code, "recipe.yaml is not a recipe of halve" in called.message) == (1, True)
    write(own.sparse / "recipe.yaml", "a: [\n")
    assert "is not a recipe" in halve("report", own.sparse, "--out", tmp_path / "report.html").message
    empty = tmp_path / "empty"
    empty.mkdir()
    called = halve("report", empty, "--out", tmp_path / "report.html")
    assert (called.code, "is empty; a model is a directory" in called.message) == (2, True)


def test_a_checkpoint_that_halve_did_not_make(halve: Halve, own: Measured, tmp_path: Path) -> None:
    out = tmp_path / "dense.html"
    document = halve("report", own.dense, "--out", out, "--json").document
    page = read_page(out)
    assert "There is no report.json" in section(page, "layers").text
    assert f"halve verify {own.dense}" in section(page, "layers").text
    assert "the command that made it is not known" in section(page, "reproduce").text
    assert document["not_measured"]["perplexity"] == f"halve eval {own.dense} --against DENSE --json > eval.json"
    assert not (own.dense / "README.md").exists()

    unpack_checkpoint(own.sparse, tmp_path / "zeros")
    pack_checkpoint(tmp_path / "zeros", tmp_path / "packed")
    (tmp_path / "packed" / "report.json").unlink(missing_ok=True)
    assert halve("report", tmp_path / "packed", "--out", tmp_path / "packed.html").code == 0
    page = read_page(tmp_path / "packed.html")
    report = read_report(own.sparse)
    assert report is not None
    layers = section(page, "layers").all("details")[0].rows()
    pruned = {layer["name"]: layer for layer in report["layers"] if layer["status"] == "pruned"}
    assert layers == {name: [layer["bytes_before"], layer["bytes_after"]] for name, layer in pruned.items()}


def test_the_file_must_not_be_there(halve: Halve, own: Measured, tmp_path: Path) -> None:
    out = write(tmp_path / "report.html", "mine")
    called = halve("report", own.sparse, "--out", out)
    assert (called.code, "is there already; choose another --out" in called.message) == (2, True)
    assert out.read_text() == "mine"
    called = halve("report", own.sparse, "--out", tmp_path / "none" / "report.html")
    assert (called.code, "there is no directory" in called.message) == (2, True)
    called = halve("report", own.sparse, "--beside", own.sparse, "--out", tmp_path / "b.html")
    assert (called.code, "names a checkpoint twice" in called.message) == (2, True)


def test_without_matplotlib(halve: Halve, own: Measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    called = halve("report", own.sparse, "--out", tmp_path / "report.html")
    assert (called.code, "pip install -e '.[report]'" in called.message) == (2, True)


def test_results_of_another_checkpoint_are_left_out(halve: Halve, own: Measured, tmp_path: Path) -> None:
    other = json.loads(own.bench.read_text())
    other["models"]["sparse"].update(weights_sha256="0" * 64, tpot_seconds={"samples": [7.0] * 8})
    foreign = write(tmp_path / "foreign.json", other)
    out = tmp_path / "report.html"
    called = halve("report", own.sparse, "--results", foreign, "--results", own.evaluation, "--out", out, "--json")
    [note] = [note for note in called.document["notes"] if "left out" in note]
    assert note.startswith(f"{foreign} is of ")
    assert "another checkpoint" in note
    page = read_page(out)
    assert note in page.text
    assert section(page, "speed").values == []
    assert foreign.name not in section(page, "reproduce").text


@pytest.mark.parametrize(
    ("named", "sealed", "directory", "own_seal", "expected"),
    [
        ("runs/a", None, "/data/runs/a", None, True),
        ("/data/runs/a", None, "runs/a", None, True),
        ("a", None, "/data/runs/a", None, True),
        ("b/a", None, "/data/runs/a", None, False),
        ("runs/a2", None, "/data/runs/a", None, False),
        ("/other/runs/a", None, "/data/runs/a", None, False),
        ("..", None, "/data/runs/a", None, False),
        (".", None, "/data/runs/a", None, False),
        (None, None, "/data/runs/a", None, False),
        (None, "s", "/data/runs/a", "s", True),
        ("/other/x", "s", "/data/runs/a", "s", True),
        ("runs/a", "t", "/data/runs/a", "s", False),
        ("runs/a", "t", "/data/runs/a", None, True),
    ],
)  # fmt: skip
def test_whose_result_it_is(named: Any, sealed: Any, directory: str, own_seal: Any, expected: bool) -> None:
    entry = {name: value for name, value in (("directory", named), ("weights_sha256", sealed)) if value}
    result = Result(Path("r.json"), "", {"kind": "eval"}, Side("", "eval", {}, entry=entry), None)
    assert belongs(result, Checkpoint(Path(directory), "a", "", [], 0, sealed=own_seal)) is expected


def test_the_seal_follows_the_weights(own: Measured, tmp_path: Path) -> None:
    first = seal(own.sparse)
    assert first is not None
    (own.sparse / "config.json").write_text("{}")
    assert seal(own.sparse) == first
    assert seal(own.dense) is None  # transformers wrote it, without a digest
    assert seal(tmp_path / "nothing") is None
    document = json.loads(own.evaluation.read_text())
    assert [model["weights_sha256"] for model in document["models"]] == [None, first]


# The model card


def test_the_card_gets_the_figures_once(halve: Halve, own: Measured, tmp_path: Path) -> None:
    readme = own.sparse / "README.md"
    before = readme.read_text()
    results = ["--results", own.evaluation, "--results", own.bench]
    assert halve("report", own.sparse, *results, "--out", tmp_path / "1.html", "--json").document["card"] == str(readme)
    first = readme.read_text()
    assert first.startswith(before.rstrip())
    assert first.count(card.BEGIN) == first.count(card.END) == 1
    bench = json.loads(own.bench.read_text())
    [row] = [line for line in first.splitlines() if line.startswith("| time per output token")]
    written = [float(number) for number in re.findall(r"([\d.]+) ms", row)]
    medians = [bench["models"][side]["tpot_seconds"]["median"] * 1e3 for side in ("dense", "sparse")]
    assert written == pytest.approx(medians, abs=0.051)
    assert (
        f"| {json.loads(own.evaluation.read_text())['perplexity']:,.0f} |" in first
    )  # four digits or all of the whole part
    assert halve("verify", own.sparse).code == 0  # report.json accounts for the new card
    accounted = tree(own.sparse)
    assert halve("report", own.sparse, *results, "--out", tmp_path / "2.html").code == 0
    assert tree(own.sparse) == accounted

    edited = f"My own words.\n{first}\nAnd more.  \n"
    readme.write_text(edited)
    assert halve("report", own.sparse, "--results", own.evaluation, "--out", tmp_path / "3.html").code == 0
    after = readme.read_text()
    assert after.partition(card.BEGIN)[0] == edited.partition(card.BEGIN)[0]
    assert after.partition(card.END)[2] == edited.partition(card.END)[2]
    assert "time per output token" not in after
    assert halve("verify", own.sparse).code == 0
    assert halve("report", own.sparse, *results, "--no-card", "--out", tmp_path / "4.html").code == 0
    assert readme.read_text() == after
    report = read_report(own.sparse)
    assert report is not None
    assert report["bytes"]["total"] == sum(f.stat().st_size for f in own.sparse.rglob("*") if f.is_file())


@pytest.mark.parametrize(
    "text", [card.BEGIN, card.END, f"{card.END}\n{card.BEGIN}", f"{card.BEGIN}{card.END}{card.BEGIN}"]
)
def test_broken_marks_are_refused(text: str, halve: Halve, own: Measured, tmp_path: Path) -> None:
    (own.sparse / "README.md").write_text(text)
    before = tree(own.sparse)
    called = halve("report", own.sparse, "--results", own.evaluation, "--out", tmp_path / "r.html")
    assert (called.code, "Remove both" in called.message) == (2, True)
    assert tree(own.sparse) == before
    assert not (tmp_path / "r.html").exists()


def test_a_card_that_is_no_text(halve: Halve, own: Measured, tmp_path: Path) -> None:
    (own.sparse / "README.md").write_bytes(b"\xff\xfe\x00")
    called = halve("report", own.sparse, "--results", own.evaluation, "--out", tmp_path / "r.html")
    assert (called.code, "--no-card" in called.message) == (2, True)


unmarked = st.text().filter(lambda text: card.BEGIN not in text and card.END not in text)


@given(unmarked, unmarked, unmarked, unmarked)
def test_only_the_section_changes(before: str, old: str, after: str, new: str) -> None:
    path = Path("README.md")
    text = f"{before}{card.BEGIN}{old}{card.END}{after}"
    once = card.replaced(text, new, path)
    assert once == f"{before}{card.BEGIN}\n{new}\n{card.END}{after}"
    assert card.replaced(once, new, path) == once
    added = card.replaced(before, new, path)
    assert added.startswith(before.rstrip())
    assert card.replaced(added, new, path) == added
    with pytest.raises(OutputError):
        card.replaced(f"{text}{card.END}", new, path)


# Several runs


def run(name: str, perplexity: float | None, speed: float | None) -> Run:
    def row(ratio: float) -> Row:
        return Row("", "seconds", ratio, 1.0, ratio)

    first = None if perplexity is None else row(perplexity)
    return Run(name, name, "", None, 0, first, None if speed is None else row(1 / speed))


@given(st.lists(st.tuples(st.sampled_from([1.0, 1.5, 2.0, 4.0]), st.sampled_from([0.5, 1.0, 2.0])), max_size=7))
def test_the_front_is_what_nothing_beats(places: list[tuple[float, float]]) -> None:
    runs = [run(str(index), *place) for index, place in enumerate(places)] + [run("without", 1.0, None)]
    beaten = set()
    for index, (perplexity, speed) in enumerate(places):
        for other, faster in places:
            if other <= perplexity and faster >= speed and (other < perplexity or faster > speed):
                beaten.add(str(index))
    assert summary.pareto(runs) == {str(index) for index in range(len(places))} - beaten


def test_runs_beside_each_other(halve: Halve, own: Measured, tmp_path: Path) -> None:
    """Three directories with the same weights, told apart by their names; the third was measured by another protocol."""
    second = Path(shutil.copytree(own.sparse, tmp_path / "second"))
    third = Path(shutil.copytree(own.sparse, tmp_path / "third"))
    results = []
    for directory, shift, factor, prompt in ((own.sparse, 0, 1, 8), (second, 0.5, 0.5, 8), (third, 0.1, 0.9, 9)):
        for source in (own.evaluation, own.bench):
            document = json.loads(source.read_text())
            for model in document["models"] if document["kind"] == "eval" else document["models"].values():
                model.pop("weights_sha256")
            model = document["models"][-1] if document["kind"] == "eval" else document["models"]["sparse"]
            model["directory"] = str(directory)
            if document["kind"] == "eval":
                model["losses"] = [loss + shift for loss in model["losses"]]
            else:
                model["tpot_seconds"]["samples"] = [factor * sample for sample in model["tpot_seconds"]["samples"]]
                document["load"]["prompt"] = prompt
            results.append(write(tmp_path / f"{directory.name}-{source.name}", document))
    flags = [part for path in results for part in ("--results", path)]
    out = tmp_path / "report.html"
    beside = ["--beside", second, "--beside", third]
    called = halve("report", own.sparse, *beside, *flags, "--out", out, "--no-card", "--json")
    assert called.code == 0
    assert not [note for note in called.document["notes"] if "left out" in note]
    page = section(read_page(out), "accuracy")
    rows = {label: values for label, values in page.rows().items() if "perplexity" not in label}
    [own_row] = [values for label, values in rows.items() if label.endswith(str(own.sparse))]
    [second_row] = [values for label, values in rows.items() if label.endswith(str(second))]
    assert second_row[3] == pytest.approx(own_row[3] * np.exp(0.5))
    assert second_row[4] == pytest.approx(own_row[4] * 2)
    [third_label] = [label for label in rows if str(third) in label]
    assert "its speed was measured by another protocol" in third_label
    described = page.all("svg")[0].all("desc")[0].text
    assert described.count("not beaten by another") == 2
    assert f"{second_row[4]:.2f} times as fast, perplexity {second_row[3]:.2f} times dense" in described


def test_a_large_model_makes_a_small_file() -> None:
    """80 blocks, with experts in each: the picture has their means, the table its first rows."""
    kinds = ["self_attn.q_proj", "self_attn.o_proj", *(f"mlp.experts.{expert}.up_proj" for expert in range(16))]
    layers = []
    for block in range(80):
        for kind in kinds:
            name = f"model.layers.{block}.{kind}"
            layers.append(Layer(name, *checkpoints._place(name), (64, 64), 8192, 4608, 0.001 * (block + 1)))
    found = Checkpoint(Path("large"), "large", "Model", layers, 10**9, {"pattern": "2:4"}, complete=True)
    page = Page(found, [], [], [])
    text = page.render()
    assert len(text.encode()) < 1_500_000
    assert {layer.kind for layer in layers} == {"self_attn.q_proj", "self_attn.o_proj", "mlp.experts.*.up_proj"}
    assert page.heat_map is not None
    assert page.heat_map.wide.count("<title>") == 80 * 3  # beside the picture's own
    assert "and 15 more: mean 0.08" in page.heat_map.wide
    assert "440 more are in report.json" in text


def test_what_was_kept_dense_by_a_budget_is_shown_with_what_it_buys(halve: Halve, tmp_path: Path) -> None:
    dense = tiny_models.build("llama", tmp_path / "dense", layers=2)
    sparse = compress(dense, tmp_path / "sparse", allocate=0.3).directory
    out = tmp_path / "report.html"
    assert halve("report", sparse, "--out", out).code == 0
    report = read_report(sparse)
    assert report is not None
    found = report["allocation"]
    page = section(read_page(out), "layers")
    share = found["given_back"] / found["saves_all"]
    kept = [candidate for candidate in found["candidates"] if candidate["kept_dense"]]
    layers = sum(len(candidate["names"]) for candidate in kept)
    [line] = [p for p in page.all("p") if "of what pruning them all would save" in p.text]
    assert line.values == [layers, found["given_back"], share, found["error_all"], found["error_left"]]
    [every] = [details for details in page.all("details") if "loses for what it saves" in details.text]
    rows = every.rows()
    for candidate in found["candidates"]:
        assert rows[", ".join(candidate["names"])] == [candidate["error"], candidate["saves"]]
    described = next(desc.text for desc in page.all("desc") if "chosen" in desc.text)
    assert described.endswith(f"chosen: {100 * share:.1f} %, {found['error_left']:.3g}")
    report["allocation"]["candidates"][0]["error"] = -1
    write(sparse / "report.json", report)
    refused = halve("report", sparse, "--out", tmp_path / "other.html")
    assert "allocation.candidates.0.error" in refused.stderr
