"""What the tests of `halve report` share: a small pruned model, real results of it, and a reader of the page."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from serve.measure.commands import bench
from serve.measure.evaluation import evaluate
from serve.measure.latency import round_of, summary
from serve.measure.outcomes import Outcome, Outcomes
from tests import tiny_models
from tests.runs import calibration, compress

VOID = {"meta", "br", "link", "img", "input", "hr"}


@dataclass(frozen=True)
class Measured:
    """Directories of a dense and a pruned model, with the documents that were measured of them."""

    dense: Path
    sparse: Path
    evaluation: Path
    bench: Path


def measured(directory: Path) -> Measured:
    """Prunes a small llama but for one kind of its layers, and measures it."""
    dense = tiny_models.build("llama", directory / "dense", layers=3)
    sparse = compress(dense, directory / "sparse", ignore=("*.k_proj",)).directory
    text = str(calibration(directory))
    evaluation, speed = directory / "eval.json", directory / "bench.json"
    evaluation.write_text(json.dumps(evaluate(sparse, against=dense, text=text, length=32, windows=12)))
    speed.write_text(json.dumps(bench(sparse, against=dense, prompt=8, output=4, rounds=8)))
    return Measured(dense, sparse, evaluation, speed)


def _load(factor: float, index: int) -> dict[str, Any]:
    """A load of eight rounds of 20 requests."""
    generator = np.random.default_rng(index)
    done = []
    for _ in range(8):
        requests = []
        for number in range(20):
            ttft, tpot = (np.array([0.1, 0.02]) * factor * (1 + index) * np.exp(generator.normal(0, 0.1, 2))).tolist()
            events = [number + ttft + tpot * place for place in range(4)]
            requests.append(Outcome(float(number), float(number), 0.0, events[-1], events, 4))
        if index and factor == 1 and not done:
            requests[0] = Outcome(0.0, 0.0, 0.0, 9.0, [], 0, "it refused (500)")
        done.append(round_of(Outcomes(requests, max(one.ended for one in requests), 0.01), {}))
    return summary(done)


def endpoint_bench(dense: Path, sparse: Path, labels: tuple[str, ...] = ("concurrency=1", "concurrency=4")) -> Any:
    """What `halve bench` writes when it measured through the endpoint, as far as it is read."""

    def model(directory: Path, factor: float) -> dict[str, Any]:
        loads = {label: _load(factor, index) for index, label in enumerate(labels)}
        sizes = {"disk": int(2000 * factor), "weights": int(1_000_000 * factor), "kv_cache": 300_000}
        return {
            "directory": str(directory),
            "dtype": "float32",
            "bytes": sizes,
            "peak_process_bytes": 5_000_000,
            "loads": loads,
        }

    return {
        "kind": "bench",
        "through": "endpoint",
        "load": {
            "engine": "transformers",
            "rounds": 8,
            "levels": list(labels),
            "shapes": {
                label: {"requests": 20 + number, "prompt": 8, "output": 4} for number, label in enumerate(labels)
            },
        },
        "environment": {"machine": "a machine", "threads": 2, "date": "2026-11-24", "versions": {"halve": "0"}},
        "complete": True,
        "models": {"dense": model(dense, 1.25), "sparse": model(sparse, 1.0)},
    }


@dataclass
class Element:
    """An element of a page, with everything in it."""

    tag: str
    attributes: dict[str, str]
    children: list[Element | str] = field(default_factory=list)

    @property
    def text(self) -> str:
        parts = [child if isinstance(child, str) else child.text for child in self.children]
        return " ".join("".join(parts).split())

    def all(self, tag: str | None = None, **attributes: str) -> list[Element]:
        """The elements below, in their order, with that tag and those attributes."""
        found: list[Element] = []
        for child in self.children:
            if isinstance(child, Element):
                if tag in (None, child.tag) and attributes.items() <= child.attributes.items():
                    found.append(child)
                found += child.all(tag, **attributes)
        return found

    @property
    def values(self) -> list[float]:
        """The exact numbers below, which `data` elements carry."""
        return [float(data.attributes["value"]) for data in self.all("data")]

    def rows(self) -> dict[str, list[float]]:
        """The numbers of each row of the tables below, by its first cell's text."""
        found = {}
        for row in self.all("tr"):
            cells = row.all("th") + row.all("td")
            if cells and row.values:
                found[cells[0].text] = row.values
        return found


def read_page(path: Path) -> Element:
    """The page as a tree; fails where it is not well-formed."""
    reader = _Reader()
    reader.feed(path.read_text())
    reader.close()
    assert [element.tag for element in reader.open] == ["document"]
    return reader.open[0]


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open = [Element("document", {})]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), attrs
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open[-1].children.append(Element(tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, (self.open[-1].tag, tag, self.getpos())
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)
