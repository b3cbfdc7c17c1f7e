"""What `halve advise` predicted beside what `halve bench` measured, and the error."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from compress.errors import UsageError
from serve.measure.documents import DocumentError
from serve.measure.requests import too_many_failed

WITHIN = 0.15
"""The error of a ratio that a prediction on a device that is here is held to."""

_FIGURES = ("ttft", "tpot")
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Sampled(BaseModel):
    median: _Positive


class _Times(BaseModel):
    ttft_seconds: _Sampled
    tpot_seconds: _Sampled


class _Load(BaseModel):
    model_config = ConfigDict(extra="ignore")

    prompt: int
    output: int
    batch: int


class _Advice(BaseModel):
    kind: Literal["advice"]
    basis: str
    load: _Load
    device: dict[str, Any]
    times: dict[Literal["dense", "sparse"], _Times] | None
    speedup: dict[str, _Sampled] | None


def is_advice(path: Path) -> bool:
    """Whether a file holds what `halve advise` wrote."""
    if not path.is_file():
        return False
    try:
        document = json.loads(path.read_bytes())
    except (ValueError, OSError, RecursionError):
        return False
    return isinstance(document, dict) and document.get("kind") == "advice"


def read_advice(path: Path) -> dict[str, Any]:
    """What `halve advise` wrote.

    Raises:
        DocumentError: it is damaged.
    """
    _advice(path)
    return _object(path, "advice")


def check(advice_file: Path, bench_file: Path) -> dict[str, Any]:
    """Predicted and measured times and ratios of TTFT and TPOT, and the errors (predicted / measured - 1).

    Raises:
        DocumentError: a file is damaged or of another kind; UsageError: they are of different loads, or one has no times.
    """
    advice = _advice(advice_file)
    bench = _object(bench_file, "bench")
    if advice.times is None or advice.speedup is None:
        raise UsageError(
            f"{advice_file} predicts no times, because nothing can be pruned there; there is nothing to check"
        )
    models = bench.get("models")
    if not isinstance(models, dict) or not {"dense", "sparse"} <= models.keys():
        raise UsageError(
            f"{bench_file} has no dense model beside the sparse one; measure with `halve bench DIR --against DENSE`"
        )
    label = _level(bench, advice.load, bench_file)
    _require_answers(models, label, bench_file)
    measured = {form: _times_of(models[form], label, bench_file) for form in ("dense", "sparse")}
    figures = {}
    for name in _FIGURES:
        faster = _faster(bench, label, name, measured)
        predicted = advice.speedup[name].median
        figures[name] = {
            "predicted": predicted,
            "measured": faster,
            "error": predicted / faster - 1,
            "seconds": {
                form: {
                    "predicted": (seconds := getattr(advice.times[form], f"{name}_seconds").median),
                    "measured": (found := statistics.median(measured[form][name])),
                    "error": seconds / found - 1,
                }
                for form in ("dense", "sparse")
            },
        }
    machines = [advice.device.get("name"), bench.get("environment", {}).get("machine")]
    notes = [] if machines[0] == machines[1] else [f"predicted for {machines[0]}, measured on {machines[1]}"]
    if bench.get("through") == "endpoint":
        notes.append("measured through the endpoint, whose HTTP and scheduling are not in the prediction")
    return {
        "kind": "advice-check",
        "advice": str(advice_file),
        "bench": str(bench_file),
        "basis": advice.basis,
        "load": advice.load.model_dump(),
        "speedup": figures,
        "within": WITHIN,
        "holds": all(abs(figure["error"]) <= WITHIN for figure in figures.values()),
        "notes": notes,
    }


def _advice(path: Path) -> _Advice:
    try:
        return _Advice.model_validate(_object(path, "advice"))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise DocumentError(f"{path} is damaged: {place}: {first['msg']}; make the advice again") from None


def _object(path: Path, kind: str) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise DocumentError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise DocumentError(f"{path} is not whole, or not JSON: {error}") from None
    if not isinstance(document, dict) or document.get("kind") != kind:
        raise DocumentError(
            f"{path} is no document of kind {kind!r}; give what `halve {'advise' if kind == 'advice' else kind} --json` prints"
        )
    return document


def _level(bench: Mapping[str, Any], load: _Load, path: Path) -> str | None:
    """The load that was predicted for: None for the one of a bench in process, its label among those of an endpoint.

    Raises:
        UsageError: something else was measured.
    """
    described = _mapping(bench.get("load"))
    labels = described.get("levels")
    batches: dict[str | None, str] = {None: str(described.get("batch"))}
    if isinstance(labels, list):
        batches = {str(label): str(label).removeprefix("concurrency=") for label in labels}
    told = []
    for label, batch in batches.items():
        # Each load of an endpoint says its own lengths; a bench in process has one for all.
        shape = _mapping(_mapping(described.get("shapes")).get(label or "")) or described
        found = {"prompt": shape.get("prompt"), "output": shape.get("output"), "batch": batch}
        if found == {"prompt": load.prompt, "output": load.output, "batch": str(load.batch)}:
            return label
        told.append(", ".join(f"{name} {value}" for name, value in found.items()))
    raise UsageError(
        f"the advice is for prompt {load.prompt}, output {load.output}, batch {load.batch}, and {path} was measured with "
        f"{' and '.join(told)}; advise again with these, or measure again"
    )


def _require_answers(models: Mapping[str, Any], label: str | None, path: Path) -> None:
    """Raises UsageError where so many requests of a load failed that it has no figures."""
    for form in ("dense", "sparse"):
        load = _mapping(_mapping(_mapping(models[form]).get("loads")).get(label or ""))
        failed, requests = load.get("errors"), load.get("requests")
        if isinstance(failed, int) and isinstance(requests, int) and too_many_failed(failed, requests):
            raise UsageError(
                f"{path}: {failed} of {requests} requests of {label} failed on the {form} side; measure again"
            )


def _times_of(model: Any, label: str | None, path: Path) -> dict[str, list[float]]:
    """Samples of TTFT and TPOT: of the rounds in process, of all requests of a load at an endpoint."""
    entry = model if label is None else _mapping(_mapping(model).get("loads")).get(label)
    return {name: _samples(entry, f"{name}_seconds", path) for name in _FIGURES}


def _faster(
    bench: Mapping[str, Any], label: str | None, name: str, measured: Mapping[str, Mapping[str, list[float]]]
) -> float:
    """How many times as fast sparse was: within rounds in process, and at an endpoint as the bench itself says it."""
    dense, sparse = measured["dense"][name], measured["sparse"][name]
    if label is None:
        return statistics.median(slow / fast for slow, fast in zip(dense, sparse, strict=False))
    told = _mapping(_mapping(_mapping(bench.get("speedup")).get(label)).get(name)).get("median")
    if isinstance(told, int | float) and told > 0:
        return float(told)
    return statistics.median(dense) / statistics.median(sparse)


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _samples(entry: Any, name: str, path: Path) -> list[float]:
    samples = _mapping(_mapping(entry).get(name)).get("samples")
    if (
        not isinstance(samples, list)
        or not all(isinstance(s, int | float) and s >= 0 for s in samples)
        or not any(samples)
    ):
        raise DocumentError(f"{path} has no samples of {name}; measure again")
    return [float(sample) for sample in samples if sample]  # (tokens that arrive together have no time between them)
