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
from serve.measure.statistics import STATISTICS, value_of

Better = Literal["higher", "lower"]
PERCENTILES = ("p50", "p90", "p99")


class DocumentError(UsageError):
    """A result file cannot be used."""


@dataclass(frozen=True)
class Figure:
    """One number. ``samples`` with a ``statistic`` (of `STATISTICS`) where it was sampled; without them it is exact,
    or (``sampled``) its scatter is not known."""

    value: float
    better: Better
    statistic: str | None = None
    samples: tuple[float, ...] = ()
    pairing: str | None = None
    sampled: bool = False
    """It would come out otherwise another time, or on another text."""


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


class _Round(BaseModel):
    figures: dict[str, Number | dict[str, Number]]


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
        figures |= _load_figures(model.get("loads", {}), pairing, path)
        if not figures:
            raise DocumentError(f"{path} has no figures of the model {name!r}; measure again")
        called = model.get("directory", name)
        return Side(f"{called} ({path})", "bench", figures, {"load": load}, about, model)

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
            for statistic in ("mean", *PERCENTILES):
                figure = Figure(value_of(samples, statistic), _better(name), statistic, tuple(samples), pairing, True)
                yield f"{name}.{statistic}", figure
        elif isinstance(value, dict):
            yield from _bench_figures(value, pairing, path, f"{name}.")
        elif _is_number(value):
            yield name, Figure(float(value), _better(name))


def _load_figures(loads: Mapping[str, Any], pairing: str, path: Path) -> dict[str, Figure]:
    """Figures of the loads of an endpoint, by name; with the load before it where there is more than one.

    The rounds are what is sampled. Requests of one round shared the machine's mood and waited for one another, so they are
    not independent, and to count them as samples would find differences that are none. So ``ttft.p99`` is the median over
    the rounds of what was the 99th percentile of a round, and its samples are those percentiles.
    """
    figures: dict[str, Figure] = {}
    for label, load in loads.items():
        prefix = f"{label}." if len(loads) > 1 else ""
        rounds = [_flat(one) for one in _Rounds.model_validate(load).rounds]
        for name in rounds[0]:
            samples = tuple(one[name] for one in rounds if name in one)
            if len(samples) < len(rounds) or min(samples) < 0:
                raise DocumentError(f"{path} is damaged: {label}: {name} is not in every round; measure again")
            figures[prefix + name] = Figure(value_of(samples, "p50"), _better(name), "p50", samples, pairing, True)
        figures[f"{prefix}errors"] = Figure(load.get("errors", 0), "lower")
    return figures


def _flat(one: _Round) -> dict[str, float]:
    """``{"ttft": {"p50": 1.0}, "requests_per_second": 2.0}`` as ``{"ttft.p50": 1.0, "requests_per_second": 2.0}``."""
    flat: dict[str, float] = {}
    for name, value in one.figures.items():
        flat |= {f"{name}.{part}": of for part, of in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def _better(name: str) -> Better:
    """Times and bytes are better low, rates are better high."""
    return "higher" if any(rate in name for rate in ("per_second", "throughput", "goodput")) else "lower"


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
