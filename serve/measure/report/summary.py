"""The figures of a report: one checkpoint beside its dense model, and beside other runs. Nothing here is estimated."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve.measure.documents import UNDER_LOAD
from serve.measure.report.checkpoint import Checkpoint, Layer
from serve.measure.report.results import Result
from serve.measure.report.rows import Row, row_of
from serve.measure.report.speed import latencies, load_of


@dataclass(frozen=True)
class Stack:
    """The bytes of one model by what they are; ``cache`` is None where it was not measured."""

    name: str
    pruned: float
    rest: float
    cache: float | None = None

    @property
    def total(self) -> float:
        return self.pruned + self.rest + (self.cache or 0)


@dataclass(frozen=True)
class Memory:
    """Stacks of the models, and where they come from."""

    stacks: list[Stack]
    measured: bool
    source: str

    @property
    def has_cache(self) -> bool:
        return any(stack.cache is not None for stack in self.stacks)


@dataclass(frozen=True)
class Run:
    """One checkpoint among several: perplexity and speed against its dense model, by protocols that are equal in all runs."""

    name: str
    directory: str
    method: str
    error: float | None
    bytes: int
    perplexity: Row | None = None
    speed: Row | None = None
    notes: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        return self.method if self.method != "unknown" else self.name

    @property
    def placed(self) -> bool:
        """Whether it has a place in the picture of accuracy against speed."""
        return bool(self.perplexity and self.perplexity.ratio and self.speed and self.speed.times_as_fast)


@dataclass(frozen=True)
class Kind:
    """The layers of one place in the blocks."""

    name: str
    layers: int
    pruned: int
    mean_error: float | None
    worst: Layer | None


class Commands:
    """What measures what is not there, as it is typed."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        directory, dense = shlex.quote(str(checkpoint.directory)), shlex.quote(checkpoint.source)
        self.verify = f"halve verify {directory}"
        self.evaluate = f"halve eval {directory} --against {dense} --json > eval.json"
        self.tasks = f"halve eval {directory} --against {dense} --tasks arc_easy,lambada_openai --json > tasks.json"
        self.bench = f"halve bench {directory} --against {dense} --concurrency 1,4,16 --json > bench.json"
        self.report = f"halve report {directory} --results eval.json --results bench.json --out report.html"


def perplexity(results: Iterable[Result]) -> Row | None:
    """Of the first result that has one, one with a dense model beside it before others."""
    rows = [row for result in results if (row := row_of(result, "perplexity", "perplexity", "number", _text(result)))]
    return min(rows, key=lambda row: row.dense is None, default=None)


def agreement(results: Iterable[Result]) -> list[Row]:
    """How far it says the same as the dense model."""
    for result in results:
        rows = [
            row_of(result, "agreement.top1", "same likeliest token as dense", "share", _text(result)),
            row_of(result, "agreement.kl", "KL(dense || this), nats a token", "number", _text(result)),
        ]
        if found := [row for row in rows if row]:
            return found
    return []


def tasks(results: Iterable[Result]) -> list[Row]:
    """Scores of lm-eval's tasks."""
    rows = []
    for result in results:
        for name, task in (result.measured.entry.get("tasks") or {}).items() if result.kind == "eval" else ():
            shots = "" if task.get("few_shot") is None else f", {task['few_shot']}-shot"
            load = f"{task['examples']:,} examples{shots}"
            rows += [
                row_of(result, f"{name}.{metric}", f"{name}, {metric}", "number", load) for metric in task["metrics"]
            ]
    return [row for row in rows if row]


def sizes(results: Iterable[Result]) -> list[Row]:
    """Bytes on disk, of the weights in memory, of the pruned layers, and at the peak."""
    labels = {
        "bytes.disk": "files on disk", "bytes.weights": "weights in memory", "bytes.pruned_layers": "pruned layers",
        "bytes.kv_cache": "KV cache", "peak_process_bytes": "peak of the process", "peak_gpu_bytes": "peak of the GPU",
    }  # fmt: skip
    rows: dict[str, Row] = {}
    for result in results:
        for name, label in labels.items():
            load = load_of(result) if name in UNDER_LOAD else ""
            row = row_of(result, name, label, "bytes", load)
            if row and row.value and (name not in rows or (rows[name].dense is None and row.dense is not None)):
                rows[name] = row
    return [rows[name] for name in labels if name in rows]


def undefined(results: Iterable[Result]) -> list[str]:
    """Why figures are not there that were measured: too many requests failed."""
    sides = [side for result in results for side in (result.measured, result.dense) if side]
    return [note for side in sides for note in side.notes]


def memory(checkpoint: Checkpoint, results: Iterable[Result]) -> Memory | None:
    """What the bytes are of: as measured in memory where a bench says so, else as stored. None without pruned layers."""
    before, after = checkpoint.pruned_bytes
    if not before:
        return None
    for result in sorted(results, key=lambda result: "bytes.kv_cache" not in result.measured.figures):
        sides = [side for side in (result.dense, result.measured) if side]
        if sides and all("bytes.weights" in side.figures for side in sides):
            stacks = []
            for side in sides:
                figures = side.figures
                stored = before if side is result.dense else after
                listed = figures.get("bytes.pruned_layers")
                pruned = listed.value if listed and listed.value else float(stored)
                cache = figures.get("bytes.kv_cache")
                name = "dense" if side is result.dense else "sparse"
                rest = max(figures["bytes.weights"].value - pruned, 0.0)
                stacks.append(Stack(name, pruned, rest, cache.value if cache else None))
            return Memory(stacks, True, str(result.path))
    rest = float(checkpoint.tensor_bytes - after)
    stacks = [Stack("dense", float(before), rest), Stack("sparse", float(after), rest)]
    return Memory(stacks, False, "the headers of its files")


def backends(results: Iterable[Result]) -> list[dict[str, Any]]:
    """Which backend multiplied how many layers, and why, as the benches tell."""
    keys = ("phase", "backend", "layers", "reason")
    found = []
    for result in results:
        listed = result.document.get("backends") or result.measured.entry.get("backends") or []
        for used in listed if isinstance(listed, list) else []:
            if isinstance(used, dict):
                found.append({**{key: used.get(key, "") for key in keys}, "source": str(result.path)})
    return found


def kinds(layers: Iterable[Layer]) -> list[Kind]:
    """The layers by their place in the blocks, in the order of the model."""
    by_kind: dict[str, list[Layer]] = {}
    for layer in layers:
        by_kind.setdefault(layer.kind, []).append(layer)
    result = []
    for name, own in by_kind.items():
        errors = [layer.error for layer in own if layer.error is not None]
        known = [layer for layer in own if layer.error is not None]
        worst = max(known, key=lambda layer: layer.error or 0.0, default=None)
        mean = sum(errors) / len(errors) if errors else None
        result.append(Kind(name, len(own), sum(layer.pruned for layer in own), mean, worst))
    return result


def reasons(layers: Iterable[Layer]) -> list[tuple[str, int, str]]:
    """Why layers stayed dense: the reason, how many, and the first of them."""
    dense = [layer for layer in layers if layer.why_dense is not None]
    counted = Counter(str(layer.why_dense) for layer in dense)
    first = {str(layer.why_dense): layer.name for layer in reversed(dense)}
    return [(reason, count, first[reason]) for reason, count in counted.most_common()]


def run(checkpoint: Checkpoint, results: list[Result], of: list[Result] | None = None) -> Run:
    """A checkpoint among several. ``of``: the results of the first run, whose protocols the others have to share."""
    perplexity_row, notes = _comparable(results, of, perplexity, "perplexity")
    speed, more = _comparable(results, of, lambda found: _first(latencies(found), "per output"), "speed")
    errors = [layer.error for layer in checkpoint.layers if layer.error is not None]
    return Run(
        checkpoint.name,
        str(checkpoint.directory),
        checkpoint.method,
        sum(errors) / len(errors) if errors else None,
        checkpoint.tensor_bytes,
        perplexity_row,
        speed,
        (*notes, *more),
    )


def pareto(runs: Iterable[Run]) -> set[str]:
    """The directories of the runs that no other beats in both perplexity and speed."""
    placed = [run for run in runs if run.placed]

    def place(run: Run) -> tuple[float, float]:
        assert run.perplexity is not None
        assert run.speed is not None
        return run.perplexity.ratio or 0.0, -(run.speed.times_as_fast or 0.0)

    return {
        run.directory
        for run in placed
        if not any(
            place(other) != place(run) and place(other)[0] <= place(run)[0] and place(other)[1] <= place(run)[1]
            for other in placed
        )
    }


def _first(rows: list[Row], part: str) -> Row | None:
    return next((row for row in rows if part in row.label), None)


def _comparable(results: list[Result], of: list[Result] | None, choose: Any, what: str) -> tuple[Row | None, list[str]]:
    """A row from those of the results whose protocol is that of the first run's."""
    if of is None:
        return choose(results), []
    reference = choose(of)
    if reference is None:
        return choose(results), []
    [leader] = [result for result in of if str(result.path) == reference.source][:1]
    sharing = [result for result in results if result.kind == leader.kind and _protocol(result) == _protocol(leader)]
    row = choose(sharing)
    if row is None and choose(results) is not None:
        return None, [f"its {what} was measured by another protocol than that of the first run, and is not shown"]
    return row, []


def _protocol(result: Result) -> Any:
    return result.measured.protocol.get("text" if result.kind == "eval" else "load")


def _text(result: Result) -> str:
    """The protocol of an evaluation in words."""
    protocol = result.document.get("protocol") or {}
    if result.kind != "eval" or not protocol:
        return ""
    text = Path(str(protocol.get("text", "?"))).name
    through = ", through the endpoint" if result.document.get("through") == "endpoint" else ""
    return f"{text}, {protocol.get('windows', '?')} windows of {protocol.get('length', '?')} tokens{through}"
