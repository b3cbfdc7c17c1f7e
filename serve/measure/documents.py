"""What `halve compare` reads: the documents that `halve eval --json` and `halve bench --json` write, and checkpoints.

Each becomes a `Side`: figures by name, with the samples that they are made of. Two figures can be compared if they
were measured by one protocol; two lists of samples belong together one by one if they have one `Figure.pairing`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError

from compress.artefact import read_report
from compress.errors import UsageError
from compress.files import TensorFiles
from compress.sources import read_config
from serve.measure.pooled import TAILS
from serve.measure.requests import TIMES, described, percentile, samples_of, too_many_failed
from serve.measure.statistics import STATISTICS, value_of

Better = Literal["higher", "lower"]
UNDER_LOAD = {"bytes.kv_cache", "peak_process_bytes", "peak_gpu_bytes"}
"""Sizes that depend on the load and on what else the machine holds, so that no two measurements of one model are alike."""


class DocumentError(UsageError):
    """A result file cannot be used."""


@dataclass(frozen=True)
class Figure:
    """One number. Where it was sampled, there are ``samples`` with a ``statistic`` (of `STATISTICS`), one of each window,
    example or round (NaN of a round that has none), or, for a statistic of `TAILS`, the values of each of the ``rounds``.
    Without them it is exact, or (``sampled``) its scatter is not known."""

    value: float
    better: Better
    statistic: str | None = None
    samples: tuple[float, ...] = ()
    pairing: str | None = None
    sampled: bool = False
    """It would come out otherwise another time, or on another text."""
    rounds: tuple[tuple[float, ...], ...] = ()
    failed: str = ""
    """How many of the requests failed that it is of, in words; they count as longer than all others (`requests`)."""

    @property
    def units(self) -> int:
        """How many windows, examples or rounds it is of."""
        return len(self.rounds or self.samples)


@dataclass(frozen=True)
class Side:
    """One side of a comparison. ``protocol``: what has to be equal, by what it is part of; ``about``: what may differ."""

    name: str
    kind: str
    figures: dict[str, Figure]
    protocol: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    entry: Mapping[str, Any] = field(default_factory=dict)
    """The model's part of the document, as it stands there."""
    undefined: dict[str, str] = field(default_factory=dict)
    """Figures that were measured and have no value, by name: why."""

    @property
    def notes(self) -> list[str]:
        """Those figures in words."""
        return [
            f"{self.name}: {why}, so there is no {', '.join(name for name in self.undefined if self.undefined[name] == why)}"
            for why in dict.fromkeys(self.undefined.values())
        ]


Number = Annotated[float, Field(allow_inf_nan=False)]


class _Metric(BaseModel):
    value: Number
    better: Better = "lower"
    statistic: str | None = None
    samples: list[Number] = []


class _Task(BaseModel):
    version: Any = None
    few_shot: Any = None
    examples: int
    sha256: str
    metrics: dict[str, _Metric]


class _EvalModel(BaseModel):
    directory: str
    dtype: str
    losses: Annotated[list[Number], Field(min_length=1)] | None = None
    tasks: dict[str, _Task] = {}


class _Evaluation(BaseModel):
    kind: Literal["eval"]
    through: str = "process"
    protocol: dict[str, Any] = {}
    models: Annotated[list[_EvalModel], Field(min_length=1, max_length=2)]
    agreement: dict[Literal["top1", "kl"], _Metric] = {}
    environment: dict[str, Any] = {}


class _Bench(BaseModel):
    kind: Literal["bench"]
    through: str = "process"
    load: dict[str, Any]
    models: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]
    environment: dict[str, Any] = {}
    complete: bool = True
    rounds_done: int | None = None


class _Request(BaseModel):
    intended: Number
    tokens: int
    events: list[Number]
    error: str | None = None
    ramp_up: bool | None = None


class _Round(BaseModel):
    figures: dict[str, Any]
    requests: Annotated[list[_Request], Field(min_length=1)]


class _Rounds(BaseModel):
    rounds: Annotated[list[_Round], Field(min_length=1)]


def read(path: Path) -> tuple[Side, Side | None]:
    """What was measured (or is there), and the dense model that was measured beside it, if one was.

    Raises:
        DocumentError: a file is truncated, damaged or of another program; SourceError: a directory is no checkpoint.
    """
    if path.is_dir():
        return _checkpoint(path), None
    document, digest = load(path, "compare")
    return sides(path, document, digest)


def load(path: Path, command: str) -> tuple[dict[str, Any], str]:
    """A result as it stands in its file, and the file's SHA-256; ``command`` is what asks for it.

    Raises:
        DocumentError: the file is not there, not whole, or no result of `halve eval|bench`.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DocumentError(f"there is no file {path}; give a result of `halve eval --json`, or a checkpoint") from None
    except OSError as error:
        raise DocumentError(f"cannot read {path}: {error.strerror}") from None
    try:
        document = json.loads(content)
    except RecursionError:
        document = None
    except ValueError as error:
        raise DocumentError(f"{path} is not whole, or not JSON: {error}; measure again with --json") from None
    kind = document.get("kind") if isinstance(document, dict) else None
    if not isinstance(document, dict) or not isinstance(kind, str) or kind not in ("eval", "bench"):
        what = f"a document of kind {kind!r}" if isinstance(kind, str) else "something else"
        raise DocumentError(f"{path} holds {what}; `halve {command}` reads what `halve eval|bench --json` print")
    return document, hashlib.sha256(content).hexdigest()


def sides(path: Path, document: dict[str, Any], digest: str) -> tuple[Side, Side | None]:
    """What `load` gave, as `read` gives it. Raises DocumentError: it is damaged."""
    try:
        if document["kind"] == "eval":
            return _evaluation(path, document)
        return _bench(path, _Bench.model_validate(document), digest)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise DocumentError(f"{path} is damaged: {place}: {first['msg']}; measure again") from None


def _evaluation(path: Path, content: dict[str, Any]) -> tuple[Side, Side | None]:
    document = _Evaluation.model_validate(content)
    sides = [
        _evaluated(path, document, model, entry)
        for model, entry in zip(document.models, content["models"], strict=True)
    ]
    if document.agreement:
        of = document.protocol.get("tokens_sha256")
        sides[-1].figures.update(
            {
                f"agreement.{name}": Figure(
                    found.value, "higher" if name == "top1" else "lower", "mean", tuple(found.samples), of, True
                )
                for name, found in document.agreement.items()
            }
        )
    return sides[-1], sides[0] if len(sides) == 2 else None


def _evaluated(path: Path, document: _Evaluation, model: _EvalModel, entry: Mapping[str, Any]) -> Side:
    figures: dict[str, Figure] = {}
    protocol: dict[str, Any] = {}
    if model.losses:
        protocol["text"] = document.protocol
        of = document.protocol.get("tokens_sha256")
        figures["perplexity"] = Figure(
            value_of(model.losses, "exp_mean"), "lower", "exp_mean", tuple(model.losses), of, True
        )
    for name, task in model.tasks.items():
        protocol[name] = task.model_dump(include={"version", "few_shot", "examples", "sha256"})
        for label, metric in task.metrics.items():
            known = metric.statistic in STATISTICS and bool(metric.samples)
            figures[f"{name}.{label}"] = Figure(
                metric.value,
                metric.better,
                metric.statistic if known else None,
                tuple(metric.samples) if known else (),
                task.sha256,
                True,
            )
    about = {"dtype": model.dtype, "through": document.through}
    return Side(f"{model.directory} ({path})", "eval", figures, protocol, about, entry)


def _bench(path: Path, document: _Bench, digest: str) -> tuple[Side, Side | None]:
    def side(name: str) -> Side:
        model = document.models[name]
        pairing = f"rounds of {digest}"
        figures = dict(_bench_figures({key: value for key, value in model.items() if key != "loads"}, pairing, path))
        undefined: dict[str, str] = {}
        loads = model.get("loads", {})
        for label, found in loads.items():
            own, without = _load_figures(_Rounds.model_validate(found).rounds, pairing, f"{path} is damaged: {label}")
            prefix = f"{label}." if len(loads) > 1 else ""
            figures |= {prefix + key: figure for key, figure in own.items()}
            undefined |= {prefix + key: why for key, why in without.items()}
        if not figures:
            raise DocumentError(f"{path} has no figures of the model {name!r}; measure again")
        called = model.get("directory", name)
        return Side(f"{called} ({path})", "bench", figures, {"load": load}, about, model, undefined)

    # How many rounds there were is no part of what was measured, only of how well.
    load = {key: value for key, value in document.load.items() if key != "rounds"} | {"through": document.through}
    # Of an endpoint at another address, the machine is not known.
    about = {name: document.environment.get(name, "not said") for name in ("machine", "threads")}
    asked = document.load.get("rounds")
    about["rounds"] = asked if document.complete else f"{document.rounds_done} of {asked} (interrupted)"
    names = list(document.models)
    candidate = "sparse" if "sparse" in names else names[-1]
    return side(candidate), side("dense") if "dense" in names and candidate != "dense" else None


def _bench_figures(
    entry: Mapping[str, Any], pairing: str, path: Path, prefix: str = ""
) -> Iterator[tuple[str, Figure]]:
    """Figures by name: what holds ``samples`` gives its mean and percentiles; a number is what it is."""
    for key, value in entry.items():
        name = prefix + key.removesuffix("_seconds")
        if isinstance(value, dict) and "samples" in value:
            samples = value["samples"]
            if not isinstance(samples, list) or not samples or not all(_is_positive(sample) for sample in samples):
                raise DocumentError(f"{path} is damaged: the samples of {name} are not positive numbers; measure again")
            for statistic in ("mean", "p50"):
                figure = Figure(value_of(samples, statistic), _better(name), statistic, tuple(samples), pairing, True)
                yield f"{name}.{statistic}", figure
            rounds = tuple((sample,) for sample in samples)
            for statistic, percent in TAILS.items():
                value = percentile(samples, percent)
                yield f"{name}.{statistic}", Figure(value, _better(name), statistic, (), pairing, True, rounds)
        elif isinstance(value, dict):
            yield from _bench_figures(value, pairing, path, f"{name}.")
        elif _is_number(value):
            yield name, Figure(float(value), _better(name), sampled=name in UNDER_LOAD)


def _load_figures(rounds: list[_Round], pairing: str, damaged: str) -> tuple[dict[str, Figure], dict[str, str]]:
    """The figures of one load of an endpoint by name, and why others are not defined.

    Values are of all requests, as `halve bench` prints them. What is sampled are the rounds: requests of one round shared the
    machine's mood and waited for one another, so they are not independent, and to count them as samples would find differences
    that are none. So the samples of a mean or median are those of each round, and of a tail the requests of each round.
    """
    requests = [one.model_dump(exclude_none=True)["requests"] for one in rounds]
    total = sum(map(len, requests))
    failed = sum("error" in request for one in requests for request in one)
    told = f"{failed} of {total} requests failed" if failed else ""
    figures = {"errors": Figure(failed, "lower")}
    undefined: dict[str, str] = {}
    refused = too_many_failed(failed, total)
    try:
        times = [samples_of(one) for one in requests]
    except (IndexError, ZeroDivisionError):
        raise DocumentError(f"{damaged}: a request that was answered has no tokens; measure again") from None
    for name in TIMES:
        of_rounds = tuple(tuple(one[name]) for one in times)
        pooled = [value for one in of_rounds for value in one]
        if not any(map(math.isfinite, pooled)):
            continue
        if min(pooled) < 0:
            raise DocumentError(f"{damaged}: {name} of a request is less than nothing; measure again")
        for statistic, value in described(pooled).items():
            if refused or value is None:
                undefined[f"{name}.{statistic}"] = told
            elif statistic in TAILS:
                figure = Figure(value, "lower", statistic, (), pairing, True, of_rounds, told)
                figures[f"{name}.{statistic}"] = figure
            else:
                samples = tuple(_of_round(one, statistic) for one in of_rounds)
                figures[f"{name}.{statistic}"] = Figure(value, "lower", "p50", samples, pairing, True, failed=told)
    for name in [name for name in rounds[0].figures if name not in TIMES]:
        rates: list[Any] = [one.figures.get(name) for one in rounds]
        if not all(_is_number(rate) and rate >= 0 for rate in rates):
            raise DocumentError(f"{damaged}: {name} is not in every round; measure again")
        samples = tuple(map(float, rates))
        if refused:
            undefined[name] = told
        else:
            figures[name] = Figure(value_of(samples, "p50"), _better(name), "p50", samples, pairing, True, failed=told)
    return figures, undefined


def _of_round(samples: tuple[float, ...], statistic: str) -> float:
    """The mean or median of a round: NaN of one without samples, infinite where too many failed."""
    if not samples:
        return math.nan
    return sum(samples) / len(samples) if statistic == "mean" else percentile(samples, 50)


def _better(name: str) -> Better:
    """Times and bytes are better low, rates are better high, and so is what is left for keys and values."""
    return "higher" if any(part in name for part in ("per_second", "throughput", "goodput", "kv_cache")) else "lower"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _checkpoint(directory: Path) -> Side:
    read_config(directory)
    report = read_report(directory) or {}
    summary = report.get("summary", {})
    figures = {
        "bytes.disk": Figure(sum(f.stat().st_size for f in directory.rglob("*") if f.is_file()), "lower"),
        "bytes.weights": Figure(sum(f.stat().st_size for f in TensorFiles(directory).files), "lower"),
    }
    if "pruned_bytes_after" in summary:
        figures["bytes.pruned_layers"] = Figure(summary["pruned_bytes_after"], "lower")
        figures["layers.pruned"] = Figure(summary["layers_pruned"], "higher")
    errors = [layer["relative_output_error"] for layer in report.get("layers", []) if "relative_output_error" in layer]
    if errors:
        figures["error.mean"] = Figure(sum(errors) / len(errors), "lower")
        figures["error.worst"] = Figure(max(errors), "lower")
    about = {name: summary[name] for name in ("pattern", "metric", "reconstruction") if name in summary}
    return Side(str(directory), "checkpoint", figures, about=about)
